"""Loading the model of a command: its tokenizer first, then its weights, in a dtype that this machine is fast in."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import find_adapter_config_file

from knnmoe_hf.cli.messages import notice
from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.errors import in_one_line, shown
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.auto import KNNMoEForCausalLM
from knnmoe_hf.models.precision import is_fast_on_cpu


def load_tokenizer(name: str, revision: str | None = None):
    """
    The tokenizer of a model, which is loaded before its weights, so that bad data is told before they are.

    Raises:
        OSError: naming the model, if there is no tokenizer.
    """
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise OSError(f"the tokenizer of {shown(name)} cannot be loaded ({in_one_line(error)})") from error


def load_base(options: argparse.Namespace, device: torch.device | None = None) -> PreTrainedModel:
    """
    The model of a build.

    Args:
        options: with `model`, `base_model_revision` and what `_load` needs.
        device: where to put the model if there is no `device_map`; default: the CPU.
    """
    return _load(AutoModelForCausalLM, options.model, options, device, revision=options.base_model_revision)


def load_with_memory(
    memory: RoutingMemory, options: argparse.Namespace, device: torch.device | None = None
) -> PreTrainedModel:
    """
    A memory's base model, with the memory attached.

    Args:
        memory: an open memory.
        options: with `model`, which names the base model if it has moved, and with what `_load` needs.
        device: as in `load_base`.

    Raises:
        ValueError: if neither the memory nor `options` name a base model.
        OSError: if it cannot be loaded.
    """
    name, revision = base_of(memory, options)
    with _explained(name, options):
        return _load(KNNMoEForCausalLM, name, options, device, revision=revision, memory=memory)


def load_base_of(memory: RoutingMemory, options: argparse.Namespace) -> PreTrainedModel:
    """A memory's base model alone; arguments and errors are as of `load_with_memory`."""
    name, revision = base_of(memory, options)
    with _explained(name, options):
        return _load(AutoModelForCausalLM, name, options, None, revision=revision)


@contextmanager
def _explained(name: str, options: argparse.Namespace) -> Iterator[None]:
    """Inside this context, an error of loading a memory's base model says how to name another one."""
    try:
        yield
    except OSError as error:
        if options.model is not None:
            raise
        reason = in_one_line(error)
        raise OSError(
            f"the base model {shown(name)} of this memory cannot be loaded: if it is elsewhere, name it with --model "
            f"({reason})"
        ) from error


def base_of(memory: RoutingMemory, options: argparse.Namespace) -> tuple[str, str | None]:
    """
    Name and revision of a memory's base model; `options.model` if it is given.

    Raises:
        ValueError: if neither names one.
    """
    saved = memory.config.base_model_name_or_path
    name = getattr(options, "model", None) or saved
    if name is None:
        raise ValueError("this memory does not say which base model it belongs to: name it with --model.")
    given = getattr(options, "base_model_revision", None)
    return name, given or (memory.config.base_model_revision if name == saved else None)


def tokenizer_of(memory: RoutingMemory, options: argparse.Namespace):
    """The tokenizer that was saved with a memory, or else its base model's."""
    if memory.tokenizer is not None:
        return memory.tokenizer
    name, revision = base_of(memory, options)
    with _explained(name, options):
        return load_tokenizer(name, revision)


def _load(loader, name: str, options: argparse.Namespace, device: torch.device | None, **how) -> PreTrainedModel:
    """
    A model in eval mode.

    Args:
        loader: a class with `from_pretrained`.
        name: of the model.
        options: with `device_map`, `quiet`, and `dtype`, which is set here if it is None, so that what the command
            loads later is in the same dtype.
        device: where to put the model if there is no `device_map`; default: the CPU.
        how: passed to the loader.
    """
    _check_device(options.device_map)
    on_cpu = device is None or device.type == "cpu"
    device_map = options.device_map or (None if on_cpu else {"": str(device)})
    if options.dtype is None:
        options.dtype = _default_dtype(name, how.get("revision"), options) if device_map is None else "auto"
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    how = {key: value for key, value in how.items() if value is not None}
    return loader.from_pretrained(name, dtype=dtype, device_map=device_map, **how).eval()


def _check_device(device_map: str | None) -> None:
    """
    Checks that a device is there.

    Raises:
        ValueError: for a device that torch does not see.
    """
    kind, _, index = (device_map or "").partition(":")
    found = getattr(getattr(torch, kind, None), "device_count", None)  # torch.cuda and the like
    if kind != "cpu" and found is not None and found() <= int(index or 0):
        raise ValueError(
            f"--device-map {device_map} is not possible: torch sees {found()} devices of that kind here, so leave it "
            "out for the CPU, or use auto."
        )


def _default_dtype(name: str, revision: str | None, options: argparse.Namespace) -> str:
    """`--dtype` for a model on the CPU: auto, or float32, which is said, if the CPU is slow in the saved dtype."""
    saved = saved_dtype(name, revision)
    if saved is None or is_fast_on_cpu(saved):
        return "auto"
    slow = str(saved).removeprefix("torch.")
    notice(
        options,
        f"loading {name} in float32, as this CPU has no fast {slow} instructions (--dtype {slow} to load it as saved, "
        "in half the memory)",
    )
    return "float32"


def saved_dtype(name: str, revision: str | None = None) -> torch.dtype | None:
    """
    The dtype in which `from_pretrained(name, dtype="auto")` would load a model; no weight is read.

    Args:
        name: folder or repository of a model, or of a PEFT adapter, for its base model.
        revision: of the repository.

    Returns:
        None if it cannot be found out; loading the model then says what is wrong.
    """
    try:
        name, revision = _base_model(name, revision)
        if name is None:
            return None
        config = AutoConfig.from_pretrained(name, revision=revision)
        if config.dtype is not None:
            return config.dtype
        return AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype="auto", device_map="meta").dtype
    except (OSError, ValueError):
        return None


def vocabulary_of(name: str, revision: str | None = None) -> int | None:
    """
    The number of a model's input embeddings by its configuration, so that token ids are checked before it is loaded.

    Args:
        name, revision: as for `saved_dtype`.

    Returns:
        None for an adapter, which may have embeddings of its own, and if it cannot be found out.
    """
    try:
        base, revision = _base_model(name, revision)
        if base is None or find_adapter_config_file(base, revision=revision) is not None:
            return None
        return getattr(AutoConfig.from_pretrained(base, revision=revision).get_text_config(), "vocab_size", None)
    except (OSError, ValueError):
        return None


def _base_model(name: str, revision: str | None) -> tuple[str | None, str | None]:
    """Name and revision of the model that is loaded for a name: itself, or the base of its adapter or memory."""
    adapter = find_adapter_config_file(name)
    if adapter is not None and not (Path(name) / "config.json").exists():
        return json.loads(Path(adapter).read_text()).get("base_model_name_or_path"), None
    config = AutoConfig.from_pretrained(name, revision=revision)
    if isinstance(config, KNNMoEConfig):
        return config.base_model_name_or_path, config.base_model_revision
    return name, revision
