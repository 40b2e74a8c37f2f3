"""The drop-in: `AutoModelForCausalLM.from_pretrained(memory)` gives the native base model with the memory attached."""

from os import PathLike

from transformers import PreTrainedModel

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.errors import shown
from knnmoe_hf.memory import RoutingMemory

_HUB = ("token", "cache_dir", "local_files_only", "force_download")


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
    ) -> PreTrainedModel:
        """
        Loads a base model and attaches a memory.

        Args:
            pretrained_model_name_or_path: with `memory`, the base model; without, a memory's folder or repository,
                whose base model is then loaded.
            memory: a `RoutingMemory`, or the folder or repository of one.
            memory_name: the name to attach it under.
            config: with a memory's own path, its configuration, with options changed.
            revision, subfolder: of what `pretrained_model_name_or_path` names.
            token, cache_dir, local_files_only, force_download: as in transformers, for memory and base model.
            kwargs: options of `KNNMoEConfig` in place of those that the opened memory was saved with, and
                `base_model_name_or_path` if its base model has moved; all else is for the base model's
                `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...).

        Returns:
            The base model's native instance, such as `OlmoeForCausalLM`.

        Raises:
            OSError: if the memory's base model is not where the memory says.
        """
        # not on top: transformers may be importing its auto classes just now, which is when this class is registered
        from transformers import AutoModelForCausalLM

        from knnmoe_hf.models.attach import attach_memory

        for internal in ("adapter_kwargs", "_from_auto", "_from_pipeline", "_commit_hash"):
            kwargs.pop(internal, None)
        hub = {name: kwargs[name] for name in _HUB if name in kwargs}
        place = dict(revision=revision, subfolder=subfolder)
        opened = memory
        if not isinstance(memory, RoutingMemory):
            options = {name: kwargs.pop(name) for name in KNNMoEConfig().options() if name in kwargs}
            if memory is None and config is not None:
                options = config.options() | options
            path, where = (pretrained_model_name_or_path, place) if memory is None else (memory, {})
            opened = RoutingMemory.from_pretrained(path, **where, **hub, **options)
        if memory is not None:
            base, placed = pretrained_model_name_or_path, place
            kwargs |= {"config": config} if config is not None else {}
        else:
            base, placed = _base_of(opened, config, kwargs.pop("base_model_name_or_path", None))
        kwargs |= {name: value for name, value in placed.items() if value}
        try:
            loaded = AutoModelForCausalLM.from_pretrained(base, *model_args, **kwargs)
        except OSError as error:
            if memory is not None:
                raise
            raise OSError(
                f"the base model {shown(str(base))} of this memory cannot be loaded: if it is elsewhere, pass "
                f"base_model_name_or_path=... as well ({error})"
            ) from error
        attach_memory(loaded[0] if isinstance(loaded, tuple) else loaded, opened, memory_name)
        return loaded  # with `output_loading_info`, the model and what was loaded

    @classmethod
    def _from_config(cls, config: KNNMoEConfig, **kwargs):
        raise ValueError("a memory is no model to be initialised: load it with AutoModelForCausalLM.from_pretrained.")


def _base_of(memory: RoutingMemory, config: KNNMoEConfig | None, override: str | PathLike | None) -> tuple[str, dict]:
    """Where a memory's base model is: its name, and the revision if that is the one it was built for."""
    saved = memory.config.base_model_name_or_path
    base = override or getattr(config, "base_model_name_or_path", None) or saved
    if base is None:
        raise ValueError(
            f"{shown(memory.config.name_or_path)} does not say which base model it belongs to: pass "
            "base_model_name_or_path=... as well."
        )
    return base, {"revision": memory.config.base_model_revision if base == saved else None}
