"""Checks of a build's inputs and launch, made before it starts."""

from collections.abc import Callable

from torch import nn
from transformers import Trainer

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.distributed import Processes
from knnmoe_hf.errors import shown
from knnmoe_hf.models.fingerprint import fingerprint
from knnmoe_hf.models.gates import Gate
from knnmoe_hf.training.arguments import KNNMoETrainingArguments


def check_inputs(
    model: nn.Module, args: KNNMoETrainingArguments, config: KNNMoEConfig, model_init: Callable | None
) -> None:
    """
    Checks the arguments of `KNNMoETrainer`.

    Raises:
        TypeError: for an `args` or `config` of another class.
        ValueError: for an option that is not allowed, or a model that is not a loaded module.
    """
    if not isinstance(args, KNNMoETrainingArguments):
        raise TypeError(f"args of type {type(args).__name__} are not allowed: pass KNNMoETrainingArguments.")
    if not isinstance(config, KNNMoEConfig):
        raise TypeError(f"config={shown(config)} is not allowed: pass a KNNMoEConfig.")
    config.retrieval_options()
    if not isinstance(model, nn.Module) or model_init is not None:
        given = "model_init" if model_init is not None else f"model={shown(model)}"
        raise ValueError(f"{given} is not allowed: a memory belongs to one frozen model, so pass a loaded model.")


def check_whole(trainer: Trainer) -> None:
    """
    Checks that every process has the whole model: processes may have different numbers of batches with targets, so
    they cannot run parts of one model in step.

    Raises:
        ValueError: if the model is split over processes.
    """
    splits = {
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "tensor or sequence parallelism": trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() > 1,
    }
    for name, enabled in splits.items():
        if enabled:
            raise ValueError(
                f"{name} splits the model over processes, and a build needs the whole model in each: launch without "
                "it, or load the model with device_map in one process."
            )


def check_one_pass(max_steps: int, batches: int, processes: Processes) -> None:
    """
    Checks that `max_steps` does not go over the data twice.

    Raises:
        ValueError: for more steps than each process has batches.
    """
    if max_steps > batches:
        each = " of each process" if processes.count > 1 else ""
        raise ValueError(
            f"max_steps={max_steps} is more than the {batches} batches of the data{each}: a build makes one pass over "
            "the examples, so leave max_steps out or use fewer."
        )


def check_same_model(processes: Processes, gates: list[Gate]) -> None:
    """
    Checks that all processes have loaded the same model.

    Raises:
        ValueError: if the gates of a process differ from those of process 0.
    """
    fingerprints = processes.gather(fingerprint(gates))
    if different := [index for index, other in enumerate(fingerprints) if other != fingerprints[0]]:
        raise ValueError(
            f"the gates of process {different[0]} differ from those of process 0: load the same weights in each."
        )
