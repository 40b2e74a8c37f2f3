"""Ways to offload a model's weights with accelerate on a machine without an accelerator: the CPU executes."""

import tempfile

import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")
PARTS = {
    "the embeddings": "embed_tokens",
    "the head": "lm_head",
    "the norms": "norm",
    "the gates": ("mlp.gate", "mlp.router"),
    "the experts": "experts",
    "a layer": "layers.1",
    "everything": "",
}


def device_map(model, part: str) -> dict[str, str]:
    """Which modules are on the disk, and that the others are on the CPU."""
    words = PARTS[part] if isinstance(PARTS[part], tuple) else (PARTS[part],)
    places: dict[str, str] = {}
    for name, module in model.named_modules():
        direct = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if direct and not any(name.startswith(holder + ".") for holder in places):
            places[name] = "disk" if any(word in name for word in words) else "cpu"
    assert "disk" in places.values()
    return places


def _dispatched(part: str):
    return lambda model: dispatch_model(model, device_map(model, part), offload_dir=tempfile.mkdtemp())


def _resident(model):
    """accelerate's hooks on modules whose weights stay where they are."""
    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


def _on_cpu(**options):
    return lambda model: cpu_offload(model, CPU, **options)


def _on_disk(**options):
    return lambda model: disk_offload(model, tempfile.mkdtemp(), CPU, **options)


def _whole_blocks(model):
    """The weights of a block of experts come all together, by a hook on the block and none on its gate."""
    return cpu_offload(model, CPU, preload_module_classes=[type(model.model.layers[0].mlp).__name__])


def _whole_model(model):
    return cpu_offload(model, CPU, preload_module_classes=[type(model).__name__])


OFFLOADS = {
    "hooks alone": _resident,
    "cpu_offload": _on_cpu(),
    "cpu_offload with buffers": _on_cpu(offload_buffers=True),
    "cpu_offload of whole blocks": _whole_blocks,
    "cpu_offload of the whole model": _whole_model,
    "two hooks on each module": lambda model: cpu_offload(_resident(model), CPU),
    "cpu_offload_with_hook": lambda model: cpu_offload_with_hook(model, CPU)[0],
    "disk_offload": _on_disk(),
    "disk_offload with buffers": _on_disk(offload_buffers=True),
} | {f"dispatch_model with {part} on disk": _dispatched(part) for part in PARTS}
"""Each from a model in memory to the same model, offloaded."""


def loaded_with_map(folder, part: str, **options):
    """The model of a folder, loaded with a part of it on disk."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    places = device_map(model, part)
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tempfile.mkdtemp(), **options
    ).eval()
