"""
Runs models that are split over two processes, or copied to them, with a memory and without:

    python -m tests.models.parallel_in_processes FOLDER

Each process writes what it found in FOLDER/found-INDEX.json.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from knnmoe_hf import attach_memory, disable_memory
from knnmoe_hf.models.gates import find_gates
from tests.support.models import FAMILIES, random_memory, tiny_model
from tests.support.training import trainer_for
from tests.training.build_in_processes import free_port

TOKENS = torch.randint(96, (3, 12), generator=torch.Generator().manual_seed(2))


def _sharded(modules, **options):
    """`fully_shard` on these modules of a model, in their order."""

    def apply(model, folder):
        for module in modules(model):
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)), **options)
        return model

    return apply


def _loaded(**options):
    """`from_pretrained` with a plan of transformers."""

    def load(model, folder):
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**options)).eval()

    return load


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
WAYS = {
    "fully_shard of the model": _sharded(lambda model: [model]),
    "fully_shard of the decoder": _sharded(lambda model: [model.model]),
    "fully_shard of layers": _sharded(lambda model: model.model.layers),
    "fully_shard of layers and model": _sharded(lambda model: [*model.model.layers, model]),
    "fully_shard of gates and model": _sharded(lambda model: [*[gate.module for gate in find_gates(model)], model]),
    "fully_shard in bfloat16": _sharded(lambda model: [*model.model.layers, model], mp_policy=HALF),
    "DistributedDataParallel": lambda model, folder: DistributedDataParallel(model),
    "FullyShardedDataParallel": lambda model, folder: FullyShardedDataParallel(model, device_id=torch.device("cpu")),
    "fsdp_size": _loaded(fsdp_size=2),
    "tp_size": _loaded(tp_size=2),
    "tp_size and ep_size": _loaded(tp_size=2, ep_size=2),
    "fsdp_size and ep_size": _loaded(fsdp_size=2, ep_size=2),
}


def results(model) -> dict[str, list]:
    """Logits with the memory and without it, and a generation, as JSON."""
    with torch.no_grad():
        found = {"with": model(input_ids=TOKENS).logits.float().tolist()}
        with disable_memory(model):
            found["without"] = model(input_ids=TOKENS).logits.float().tolist()
    inner = getattr(model, "module", model)
    found["generated"] = inner.generate(TOKENS[:2], max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
    return found


def tried(function, *args) -> dict:
    """What the function returns, or its error."""
    try:
        return function(*args)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def attached_after(way: str, family: str, folder: Path) -> dict:
    model = WAYS[way](tiny_model(family), folder)
    with torch.no_grad():
        base = model(input_ids=TOKENS).logits.float().tolist()
    attach_memory(model, random_memory(tiny_model(family)))
    return {"base": base} | results(model)


def attached_before(way: str, family: str, folder: Path) -> dict:
    model = tiny_model(family)
    attach_memory(model, random_memory(model))
    return results(WAYS[way](model, folder))


def refused_build(way: str, folder: Path) -> dict:
    trainer_for(WAYS[way](tiny_model("olmoe"), folder), folder, use_cpu=True, overwrite=True)
    return {"error": None}


def work(index: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    rank = dict(RANK=index, LOCAL_RANK=index, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in rank.items()} | {"MASTER_ADDR": "127.0.0.1"}
    distributed.init_process_group("gloo")
    found: dict[str, dict] = {"after": {}, "before": {}, "build": {}}
    for family in FAMILIES:
        saved = folder / family
        if index == 0:
            tiny_model(family).save_pretrained(saved)
        distributed.barrier()
        for way in WAYS:
            found["after"][f"{family} {way}"] = tried(attached_after, way, family, saved)
            if "_size" not in way:
                found["before"][f"{family} {way}"] = tried(attached_before, way, family, saved)
    for way in ("fully_shard of the model", "tp_size", "fsdp_size and ep_size"):
        found["build"][way] = tried(refused_build, way, folder / "olmoe")
    (folder / f"found-{index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    multiprocessing.start_processes(work, (free_port(), Path(sys.argv[1])), nprocs=2, start_method="fork")
