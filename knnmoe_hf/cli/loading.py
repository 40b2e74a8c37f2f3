"""Loading the model of a command: from a model's folder or a memory's, in a dtype that this machine is fast in."""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import find_adapter_config_file

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.errors import shown
from knnmoe_hf.models.attach import active_memory, get_memory
from knnmoe_hf.models.precision import is_fast_on_cpu


def add_loading(parser: argparse.ArgumentParser) -> None:
    """`--dtype` and `--device-map`."""
    parser.add_argument(
        "--dtype",
        help="float32, bfloat16, float16 or auto (as saved); default: as saved, but float32 on a CPU that has no fast "
        "instructions for the saved dtype",
    )
    parser.add_argument("--device-map", help="as in transformers, for instance auto")


def load_model(name: str, options: argparse.Namespace, device: torch.device | None = None):
    """
    Model and tokenizer; a memory's folder gives its base model with the memory attached.

    Args:
        name: folder or repository of a model or a memory.
        options: with `device_map`, and with `dtype`, which is set here if it is None, so that what the command loads
            later is in the same dtype.
        device: where to put the model if there is no `device_map`; default: the CPU.

    Raises:
        ValueError: for a `dtype` that is no dtype of weights.
    """
    on_cpu = device is None or device.type == "cpu"
    device_map = options.device_map or (None if on_cpu else {"": str(device)})
    if options.dtype is None:
        options.dtype = _default_dtype(name) if device_map is None else "auto"
    model = AutoModelForCausalLM.from_pretrained(name, dtype=_parse_dtype(options.dtype), device_map=device_map)
    memory = get_memory(model) if active_memory(model) is not None else None
    if memory is None:
        return model.eval(), AutoTokenizer.from_pretrained(name)
    return model.eval(), memory.tokenizer or AutoTokenizer.from_pretrained(model.config.name_or_path)


def _parse_dtype(name: str) -> torch.dtype | str:
    if name == "auto":
        return name
    dtype = getattr(torch, name, None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype {shown(name)} is not known: use float32, bfloat16, float16 or auto.")
    return dtype


def _default_dtype(name: str) -> str:
    """`--dtype` for a model on the CPU: auto, or float32, which is printed, if the CPU is slow in the saved dtype."""
    saved = saved_dtype(name)
    if saved is None or is_fast_on_cpu(saved):
        return "auto"
    slow = str(saved).removeprefix("torch.")
    print(
        f"loading {name} in float32, as this CPU has no fast {slow} instructions (--dtype {slow} to load it as saved, "
        "in half the memory)",
        file=sys.stderr,
    )
    return "float32"


def saved_dtype(name_or_path: str) -> torch.dtype | None:
    """
    The dtype in which `from_pretrained(name_or_path, dtype="auto")` would load a model; no weight is read.

    Args:
        name_or_path: folder or repository of a model; or of a PEFT adapter or a memory, for their base model.

    Returns:
        None if it cannot be found out; loading the model then says what is wrong.
    """
    try:
        name, revision = _base_model(name_or_path)
        if name is None:
            return None
        config = AutoConfig.from_pretrained(name, revision=revision)
        if config.dtype is not None:
            return config.dtype
        return AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype="auto", device_map="meta").dtype
    except (OSError, ValueError):
        return None


def _base_model(name_or_path: str) -> tuple[str | None, str | None]:
    """Name and revision of the model that is loaded for a name: itself, or the base of its adapter or memory."""
    adapter = find_adapter_config_file(name_or_path)
    if adapter is not None and not (Path(name_or_path) / "config.json").exists():
        return json.loads(Path(adapter).read_text()).get("base_model_name_or_path"), None
    config = AutoConfig.from_pretrained(name_or_path)
    if isinstance(config, KNNMoEConfig):
        return config.base_model_name_or_path, config.base_model_revision
    return name_or_path, None
