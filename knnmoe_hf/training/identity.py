"""What the rows of a build depend on beside its data: the model, and some of the options."""

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from knnmoe_hf.models.fingerprint import fingerprint
from knnmoe_hf.models.gates import Gate

if TYPE_CHECKING:
    from knnmoe_hf.training.trainer import KNNMoETrainer

_ALWAYS = ("builder", "builder_steps", "per_device_train_batch_size", "bf16", "tf32", "full_determinism")
_OF_BUILDER = {"search": ("seed",)}
_OF_DESCENT = ("num_candidates", "candidate_steps", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon")
_SAMPLE = 64  # values of each parameter that are looked at


def row_options(trainer: "KNNMoETrainer") -> dict[str, Any]:
    """The options that the rows depend on; how they are stored, searched and calibrated may change."""
    args = trainer.args
    names = (*_ALWAYS, *_OF_BUILDER.get(args.builder, _OF_DESCENT))
    return {name: getattr(args, name) for name in names} | {"value_space": trainer.memory_config.value_space}


def model_digests(model: nn.Module, gates: list[Gate]) -> dict[str, str]:
    """
    SHA-256 of a model's gates, and of the names, shapes, dtypes and some values of all its parameters, so that an
    adapter or another training of the same model is noticed; offloaded and quantised ones count by name alone.
    """
    weights = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        weights.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        plain = type(parameter) in (Tensor, nn.Parameter) and parameter.is_floating_point()
        if plain and parameter.device.type != "meta" and parameter.numel():
            values = parameter.detach().flatten()[:: max(1, parameter.numel() // _SAMPLE)][:_SAMPLE]
            weights.update(values.to("cpu", torch.float64).numpy())
    return {"gates": fingerprint(gates)["float32"], "weights": weights.hexdigest()}
