"""`AutoModelForCausalLM.from_pretrained(memory)`: loads a memory's base model and attaches the memory to it.

The result is an instance of the base model's own class in transformers.
"""

from os import PathLike
from typing import TYPE_CHECKING

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.errors import in_one_line, shown
from knnmoe_hf.memory import RoutingMemory

if TYPE_CHECKING:  # this class is registered whenever transformers imports its auto classes, also for a tokenizer
    from transformers import PreTrainedModel

_HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")


class KNNMoEForCausalLM:
    """Loads a base model with a routing memory; `from_pretrained` returns an instance of the base model's class."""

    config_class = KNNMoEConfig

    def __init__(self, *args, **kwargs):
        raise TypeError("KNNMoEForCausalLM has no instances: use KNNMoEForCausalLM.from_pretrained(base, memory=...).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike,
        *model_args,
        memory: RoutingMemory | str | PathLike | None = None,
        memory_name: str = "default",
        config: KNNMoEConfig | None = None,
        revision: str | None = None,
        subfolder: str = "",
        **kwargs,
    ) -> "PreTrainedModel":
        """
        Loads a base model and attaches a memory.

        Args:
            pretrained_model_name_or_path: with `memory`, the base model; without, a memory's folder or repository,
                whose base model is then loaded.
            memory: a `RoutingMemory`, or the folder or repository of one.
            memory_name: the name to attach it under.
            config: without `memory`, a `KNNMoEConfig` whose options replace those saved with the memory; with
                `memory`, the base model's configuration.
            revision, subfolder: of the repository that `pretrained_model_name_or_path` names.
            token, cache_dir, local_files_only, force_download: as in transformers, for memory and base model.
            kwargs: options of `KNNMoEConfig`, which replace those saved with the memory;
                `base_model_name_or_path`, if the base model has moved since; all others go to the base model's
                `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...).

        Returns:
            The base model's native instance, such as `OlmoeForCausalLM`.

        Raises:
            OSError: if the base model that the memory names cannot be loaded.
            ValueError: if the memory names no base model and none is given.
            UnsupportedModelError, MemoryMismatchError: as `attach_memory`.
        """
        # imported here and not at the top: this class is registered while transformers imports its auto classes
        from transformers import AutoModelForCausalLM

        from knnmoe_hf.models.attach import attach_memory

        for internal in ("adapter_kwargs", "_from_auto", "_from_pipeline", "_commit_hash"):
            kwargs.pop(internal, None)
        hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        given = dict(revision=revision, subfolder=subfolder)
        opened = memory
        if not isinstance(memory, RoutingMemory):
            options = {name: kwargs.pop(name) for name in KNNMoEConfig().options() if name in kwargs}
            if memory is None and config is not None:
                options = config.options() | options
            path, location = (pretrained_model_name_or_path, given) if memory is None else (memory, {})
            opened = RoutingMemory.from_pretrained(path, **location, **hub_options, **options)
        if memory is not None:
            base, base_location = pretrained_model_name_or_path, given
            kwargs |= {"config": config} if config is not None else {}
        else:
            base, base_location = _base_of(opened, config, kwargs.pop("base_model_name_or_path", None))
        kwargs |= {name: value for name, value in base_location.items() if value}
        try:
            loaded = AutoModelForCausalLM.from_pretrained(base, *model_args, **kwargs)
        except OSError as error:
            if memory is not None:
                raise
            raise OSError(
                f"the base model {shown(str(base))} of this memory cannot be loaded: if it is elsewhere, pass "
                f"base_model_name_or_path=... as well ({in_one_line(error)})"
            ) from error
        attach_memory(loaded[0] if isinstance(loaded, tuple) else loaded, opened, memory_name)
        return loaded  # a pair (model, loading info) with `output_loading_info=True`

    @classmethod
    def _from_config(cls, config: KNNMoEConfig, **kwargs):
        raise ValueError(
            "a routing memory cannot be initialised from a config: load it with AutoModelForCausalLM.from_pretrained."
        )


def _base_of(memory: RoutingMemory, config: KNNMoEConfig | None, override: str | PathLike | None) -> tuple[str, dict]:
    """
    Name or path of the base model to load, and its revision.

    The saved revision is used only with the saved name: another repository does not have that commit.
    """
    saved = memory.config.base_model_name_or_path
    base = override or getattr(config, "base_model_name_or_path", None) or saved
    if base is None:
        raise ValueError(
            f"{shown(memory.config.name_or_path)} does not say which base model it belongs to: pass "
            "base_model_name_or_path=... as well."
        )
    return base, {"revision": memory.config.base_model_revision if base == saved else None}
