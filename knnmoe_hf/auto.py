"""The drop-in: `AutoModelForCausalLM.from_pretrained(memory)` gives the native base model with the memory attached.

What is registered is a configuration and a loader, not a model class: a third-party model class would lose the native
fast experts and checkpoint names.
"""

from os import PathLike

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from knnmoe_hf.attach import attach_memory
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
            kwargs: for the base model's `from_pretrained` (`dtype`, `device_map`, `attn_implementation`, ...).

        Returns:
            The base model's native instance, such as `OlmoeForCausalLM`.
        """
        for internal in ("adapter_kwargs", "_from_auto", "_from_pipeline", "_commit_hash"):
            kwargs.pop(internal, None)
        hub = {name: kwargs[name] for name in _HUB if name in kwargs}
        if memory is None:
            options = config.options() if config is not None else {}
            place = dict(revision=revision, subfolder=subfolder)
            memory = RoutingMemory.from_pretrained(pretrained_model_name_or_path, **place, **hub, **options)
            base = getattr(config, "base_model_name_or_path", None) or memory.config.base_model_name_or_path
            if base is None:
                raise ValueError(
                    f"{shown(str(pretrained_model_name_or_path))} does not say which base model it belongs to: call "
                    "KNNMoEForCausalLM.from_pretrained(base, memory=...)."
                )
            same_base = base == memory.config.base_model_name_or_path
            revision, subfolder = memory.config.base_model_revision if same_base else None, ""
        else:
            base = pretrained_model_name_or_path
            if not isinstance(memory, RoutingMemory):
                memory = RoutingMemory.from_pretrained(memory, **hub)
            if config is not None:
                kwargs["config"] = config
        placed = {"revision": revision} if revision is not None else {}
        placed |= {"subfolder": subfolder} if subfolder else {}
        model = AutoModelForCausalLM.from_pretrained(base, *model_args, **placed, **kwargs)
        attach_memory(model, memory, memory_name)
        return model


def register() -> None:
    """Makes transformers' auto classes and `pipeline` know memories; called by `import knnmoe_hf`."""
    AutoConfig.register(KNNMoEConfig.model_type, KNNMoEConfig, exist_ok=True)
    AutoModelForCausalLM.register(KNNMoEConfig, KNNMoEForCausalLM, exist_ok=True)
