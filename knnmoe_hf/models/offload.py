"""Weights that are elsewhere, or in another form, between forwards.

accelerate keeps offloaded weights on the CPU or on disk and leaves tensors of the meta device in the modules. Its hook
on a module brings them, before the module's forward, to the device where it runs: its own weights, or those of all
modules in it (`preload_module_classes`). Parallel models hold a part of each weight in each process.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


def modules_around(model: nn.Module, name: str) -> tuple[nn.Module, ...]:
    """The modules that contain the module at this path, from `model` itself to its parent."""
    words = name.split(".") if name else []
    return tuple(model.get_submodule(".".join(words[:length])) for length in range(len(words)))


def accelerate_hooks(module: nn.Module) -> tuple:
    """The hooks that accelerate put on this module itself, those of a `SequentialHook` one by one."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


@contextmanager
def as_in_forward(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside this context the weights are where accelerate's hooks on these modules, outermost first, bring them."""
    with ExitStack() as stack:
        for module in modules:
            if (hook := getattr(module, "_hf_hook", None)) is not None:
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield


def is_offloaded(module: nn.Module, recurse: bool = True) -> bool:
    """Whether a weight or buffer of the module is on the meta device; its own ones only, or those of its parts too."""
    tensors = [*module.parameters(recurse), *module.buffers(recurse)]
    return any(tensor.device.type == "meta" for tensor in tensors)


def execution_device(module: nn.Module, around: Iterable[nn.Module]) -> torch.device:
    """
    The device on which a module runs.

    Args:
        module: with a weight of its own.
        around: the modules that contain it, outermost first.
    """
    for holder in reversed([*around, module]):
        for hook in accelerate_hooks(holder):
            device = getattr(hook, "execution_device", None)
            if device is not None and torch.device(device).type != "meta":
                return torch.device(device)
    return next(module.parameters()).device


def input_device(model: nn.Module, decoder: nn.Module | None = None) -> torch.device:
    """
    The device on which a language model takes its token ids.

    Args:
        model: the whole model, with whatever accelerate put on it.
        decoder: the part of it whose embeddings are meant, if `model` itself does not tell them.
    """
    embedding = (model if decoder is None else decoder).get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    return execution_device(embedding, modules_around(model, name))


def is_in_parts(module: nn.Module) -> bool:
    """Whether several processes hold a part each of some weight of the module."""
    parameters = module.parameters()
    return any(hasattr(tensor, "full_tensor") and tensor.device_mesh.size() > 1 for tensor in parameters)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process may hold a part; all processes must ask for it together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
