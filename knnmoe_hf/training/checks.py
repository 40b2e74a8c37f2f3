"""What a build cannot be made of, told before it begins."""

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
    Raises:
        TypeError, ValueError: for arguments that a build cannot be made of.
    """
    if not isinstance(args, KNNMoETrainingArguments):
        raise TypeError(f"args are {type(args).__name__}: KNNMoETrainer needs KNNMoETrainingArguments.")
    if not isinstance(config, KNNMoEConfig):
        raise TypeError(f"config is {shown(config)}: KNNMoETrainer needs a KNNMoEConfig.")
    config.retrieval_options()
    if not isinstance(model, nn.Module) or model_init is not None:
        given = "model_init" if model is None else shown(model)
        raise ValueError(f"{given} is not allowed: a memory belongs to one frozen model, so pass a loaded model.")


def check_whole(trainer: Trainer) -> None:
    """
    Raises:
        ValueError: if processes share one model, each with a part of it: they solve unlike numbers of batches.
    """
    cut = {
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "tensor or sequence parallelism": trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() > 1,
    }
    for name, there in cut.items():
        if there:
            raise ValueError(
                f"{name} cuts a model over processes, and a build needs all of it in each: launch without it, or load "
                "the model with device_map in one process."
            )


def check_one_pass(max_steps: int, batches: int, processes: Processes) -> None:
    """
    Raises:
        ValueError: for more steps than each process has batches.
    """
    if max_steps > batches:
        each = " of each process" if processes.count > 1 else ""
        raise ValueError(
            f"max_steps={max_steps} is more than the {batches} batches of the data{each}: an example is solved once, "
            "so leave max_steps out or use fewer."
        )


def check_same_model(processes: Processes, gates: list[Gate]) -> None:
    """
    Raises:
        ValueError: if the gates of another process have other weights.
    """
    prints = processes.gather(fingerprint(gates))
    if unlike := [index for index, found in enumerate(prints) if found != prints[0]]:
        raise ValueError(
            f"the gates of process {unlike[0]} are not those of process 0: load the same weights in every process."
        )
