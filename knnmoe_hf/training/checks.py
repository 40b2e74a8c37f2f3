"""Checks of a build's inputs and launch, made before it starts."""

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import SaveStrategy

from knnmoe_hf.calibration.background import BackgroundText
from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.data.batches import IGNORED
from knnmoe_hf.distributed import Processes
from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.layer import SAMPLE, specification
from knnmoe_hf.memory.base_model import BaseModel
from knnmoe_hf.memory.hub import check_push, check_repository_name
from knnmoe_hf.memory.ownership import CARD, Save, check_folder, existing_part
from knnmoe_hf.memory.tokenizer import saved_tokenizer
from knnmoe_hf.models.fingerprint import fingerprint
from knnmoe_hf.models.gates import Gate
from knnmoe_hf.models.offload import is_in_parts
from knnmoe_hf.training.arguments import KNNMoETrainingArguments
from knnmoe_hf.training.checkpoints import size_of


def check_inputs(
    model: nn.Module, args: KNNMoETrainingArguments, config: KNNMoEConfig, model_init: Callable | None
) -> None:
    """
    Checks the arguments of `KNNMoETrainer`.

    Raises:
        TypeError: for an `args` or `config` of another class.
        ValueError: for an option that is not allowed, or a model that is not a loaded module or not a whole one.
    """
    if not isinstance(args, KNNMoETrainingArguments):
        raise TypeError(f"args of type {type(args).__name__} are not allowed: pass KNNMoETrainingArguments.")
    if not isinstance(config, KNNMoEConfig):
        raise TypeError(f"config={shown(config)} is not allowed: pass a KNNMoEConfig.")
    config.retrieval_options()
    args.check_recall(config.recall)
    if args.push_to_hub and config.recall != "routing":
        raise ValueError(
            f"push_to_hub=True is not allowed with recall={config.recall!r}: it uploads no text and no next tokens, "
            "which that needs, so leave it out and call push_to_hub(next_tokens=True) after train."
        )
    if not isinstance(model, nn.Module) or model_init is not None:
        given = "model_init" if model_init is not None else f"model={shown(model)}"
        raise ValueError(f"{given} is not allowed: a memory belongs to one frozen model, so pass a loaded model.")
    if is_in_parts(model):
        raise ValueError(
            "the model's weights are split over processes (fully_shard, tensor or expert parallelism), and a build "
            "needs the whole model in each: load it without, or with device_map in one process."
        )


def check_widths(args: KNNMoETrainingArguments, config: KNNMoEConfig, gates: list[Gate]) -> None:
    """
    Checks the options that must fit the model's gates.

    Args:
        args, config: of the build.
        gates: of the layers that it stores.

    Raises:
        ValueError: naming the option, what the model has, and what is allowed.
    """
    experts, top_k = min(gate.max_width for gate in gates), max(gate.top_k for gate in gates)
    of_width = min(gate.num_experts for gate in gates) if config.value_space == "assignment" else experts
    width, candidates, layers = config.routing_width, args.num_candidates, args.num_layers
    if isinstance(width, int) and width > of_width:
        raise ValueError(
            f"routing_width={width} is not allowed: {of_width} experts of the model can be given to a token, so use at"
            " most that."
        )
    if candidates is not None and not top_k <= candidates <= experts:
        raise ValueError(
            f"num_candidates={candidates} is not allowed: use at least the model's own top-k, {top_k}, and at most "
            f"the {experts} experts among which a token chooses."
        )
    if layers is not None and layers > len(gates):
        raise ValueError(f"num_layers={layers} is not allowed: {len(gates)} layers get rows, so use at most that.")


def check_background(texts: Mapping[str, BackgroundText] | None) -> None:
    """
    Checks that background text can be used: by a calibration, and by the verdict whatever the confidence is.

    Raises:
        ValueError: for text without a target.
    """
    if texts is None:
        return
    empty = [kind for kind, text in texts.items() if not any(_targets(row) for row in text.rows)]
    if empty or not texts:
        which = f" of kind {shown(empty[0])}" if empty and empty != ["given"] else ""
        raise ValueError(
            f"ordinary_dataset{which} has no text of two tokens or more: give other text, or leave it out."
        )


def check_output(
    model: nn.Module, args: KNNMoETrainingArguments, gates: list[Gate], tokenizer, memory_name: str
) -> None:
    """
    Checks that the memory can be attached, saved and, if `args` say so, uploaded.

    Args:
        model: the base model.
        args: of the build.
        gates: all gates of the model.
        tokenizer: saved with the memory, or None.
        memory_name: under which it is attached.

    Raises:
        FileExistsError, PermissionError: if `args.output_dir` holds what a save would write over, or is read-only.
        TypeError, ValueError: for a tokenizer that cannot be saved, or a name that is not allowed.
    """
    if not isinstance(memory_name, str):
        raise TypeError(f"memory_name={shown(memory_name)} is not allowed: use a string.")
    if args.push_to_hub:
        about = dict(revision=args.hub_revision, private=args.hub_private_repo, token=args.hub_token)
        about |= dict(overwrite=args.overwrite, fingerprint=lambda: fingerprint(gates))
        check_push(repository_name(args), **about)
    elif args.hub_model_id is not None:
        check_repository_name(args.hub_model_id)
    folder, base = Path(args.output_dir), BaseModel(model).name_or_path
    with tempfile.TemporaryDirectory() as scratch:
        names = saved_tokenizer(tokenizer, scratch) if tokenizer is not None else []
        files = {name: Path(scratch) / name for name in names} | {CARD: None}
        check_folder(folder, Save(files, lambda: fingerprint(gates), base, args.overwrite))


def repository_name(args: KNNMoETrainingArguments) -> str:
    """The repository that `push_to_hub` uploads to."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def check_disk(dataset, args: KNNMoETrainingArguments, config: KNNMoEConfig, gates: list[Gate]) -> None:
    """
    Checks that a build's rows fit on the disk of `args.output_dir`: first as they are, then the encoded memory too.

    Args:
        dataset: prepared examples; a stream is not checked, as its length is not known.
        args, config: of the build.
        gates: of the layers that it stores.

    Raises:
        OSError: naming how much is needed and how much is free.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return
    place = existing_part(Path(args.output_dir))
    # the rows of a checkpoint are there already if the build goes on from it
    free, count = shutil.disk_usage(place).free + size_of(args.output_dir), len(dataset)
    if args.max_steps > 0:
        count = min(count, args.max_steps * args.per_device_train_batch_size * args.world_size)
    rows = sum(_targets(dataset[index]) for index in range(count))
    needed = build_bytes(rows, config, gates)
    if args.save_strategy != SaveStrategy.NO:  # rows are on the disk twice while a checkpoint of them is written
        each = args.save_steps if args.save_strategy == SaveStrategy.STEPS and args.save_steps >= 1 else count
        new = min(count, each * args.per_device_train_batch_size * args.world_size)
        needed += math.ceil(build_bytes(rows, config, gates, stored=False) * new / max(count, 1))
    if needed > free:
        raise OSError(
            f"{shown(str(args.output_dir))} has {_megabytes(free)} MB free where the build of {rows:,} reference "
            f"tokens needs {_megabytes(needed)} MB: name a folder on a larger disk as output_dir, or use fewer "
            "examples or layers."
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.{0 if count >= 1e8 else 1}f}"


def build_bytes(rows: int, config: KNNMoEConfig, gates: list[Gate], stored: bool = True) -> int:
    """Bytes on disk of so many rows: of gate inputs and logits, and of the encoded memory unless `stored` is False."""
    needed = 0
    for gate in gates:
        sample = (min(rows, SAMPLE), config.num_neighbors)
        encoded = specification(rows, gate.hidden_size, gate.num_experts, sample, config.options())
        needed += rows * (gate.hidden_size * gate.weight.dtype.itemsize + gate.num_experts * 4)
        needed += sum(math.prod(shape) * dtype.itemsize for shape, dtype in encoded.values()) if stored else 0
    return needed


def _targets(row: Mapping[str, Any]) -> int:
    """Tokens of a prepared row that predict a target; padding between them counts too."""
    return int((np.asarray(row["labels"])[1:] != IGNORED).sum())


def check_launch(trainer: Trainer) -> None:
    """
    Checks that the processes that were launched know of each other, and that every one has the whole model: they may
    have different numbers of batches with targets, so they cannot run parts of one model in step.

    Raises:
        ValueError: if the processes would each build a memory, or if the model is split over them.
    """
    launched, known = int(os.environ.get("WORLD_SIZE", "1")), trainer.args.world_size
    if launched > known:  # without an accelerator, accelerate joins processes only if it is told that they use CPUs
        raise ValueError(
            f"{launched} processes were launched, and the arguments know of {known}, so that each would build a memory"
            " of its own: on CPUs pass use_cpu=True in KNNMoETrainingArguments."
        )
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
