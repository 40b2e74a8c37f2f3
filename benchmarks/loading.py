"""Opening a saved memory: seconds and memory against its size, and what processes that open the same one share.

    OMP_NUM_THREADS=1 python benchmarks/loading.py --gigabytes 2

Memories of the hidden size, experts and layers of OLMoE-1B-7B are saved, and each is opened in a process of its own:
for the first time, with its files out of the page cache where the system allows that, which reads and checks every
byte; and again, which maps the files and reads none of them. Anonymous memory is the process's own, mapped is what of
the files it has touched, which the system may drop and processes share. Attaching builds the search engine of every
layer, on a model whose experts are small; it takes long, so that larger memories can be left out of it. Attaching
again, in another process, reads the index that was kept. Writes `benchmarks/results/loading.md` and `.json`.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it knows only its own folder

import torch
from torch import nn

from benchmarks.measuring import Growth, growth, hardware, resident, shown_growth, shown_hardware, write
from benchmarks.report import markdown
from benchmarks.results import FOLDER
from benchmarks.synthetic import first_rows, memory_of, random_model, synthetic_rows
from knnmoe_hf import KNNMoEConfig, RoutingMemory, attach_memory
from knnmoe_hf.lookup.options import SEARCH_BACKENDS
from knnmoe_hf.memory.size import PUBLISHED, plan_memory
from knnmoe_hf.models.gates import find_gates

MODEL = "allenai/OLMoE-1B-7B-0924"
PARTS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Of the largest memory."""


def small_model(layers: int) -> nn.Module:
    """Gates of full size, all else as small as it goes."""
    config = copy.deepcopy(PUBLISHED[MODEL])
    config.num_hidden_layers, config.num_key_value_heads = layers, 1
    config.intermediate_size, config.vocab_size = 16, 64
    return random_model(config, torch.device("cpu"), torch.bfloat16)


def save_memory(model: nn.Module, rows: int, folder: Path) -> int:
    """Saves a memory of so many rows a layer, the same in each layer; its files' bytes, out of the page cache."""
    config, gates = KNNMoEConfig(), find_gates(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, gates[0].hidden_size, generator=generator)
    logits = torch.randn(256, gates[0].num_experts, generator=generator)
    table = first_rows(synthetic_rows(x, logits, rows, config, seed=0), rows, config)
    layers = {gate.layer: copy.deepcopy(table) for gate in gates}  # a file holds no tensor twice
    memory_of(layers, gates, config).save_pretrained(folder)
    files = list(folder.glob("*.safetensors"))
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return sum(path.stat().st_size for path in files)


def mapped(process: int | str = "self") -> dict[str, int]:
    """Bytes of the memory's files in a process: touched (`Rss`), and its share of those (`Pss`)."""
    found, inside = {"Rss": 0, "Pss": 0}, False
    smaps = Path(f"/proc/{process}/smaps")
    for line in smaps.read_text().splitlines() if smaps.exists() else []:
        name, _, value = line.partition(":")
        if name in found:
            found[name] += 1024 * int(value.split()[0]) if inside else 0
        elif "-" in name.split()[0]:  # `7f00-7f10 r--s 00000000 08:01 12 /path`, the head of a mapping
            inside = line.endswith(".safetensors")
    return found


def opened(folder: str, attach: int, engine: str, wait: bool) -> dict:
    """Run in a process of its own: opens, and if asked attaches (to so many layers) or stays to be looked at."""
    model = small_model(attach) if attach else None
    held, started = resident(), time.perf_counter()
    memory = RoutingMemory.from_pretrained(folder, search_backend=engine)
    told = {"seconds": time.perf_counter() - started, "rows": len(memory), "anonymous": resident() - held}
    told |= {"peak": resident("VmHWM"), "mapped": mapped()["Rss"]}
    if attach:
        started = time.perf_counter()
        attach_memory(model, memory)
        told |= {"attach_seconds": time.perf_counter() - started, "attach_anonymous": resident() - held}
        told["attach_mapped"] = mapped()["Rss"]
    if wait:
        for rows in memory.layers.values():
            for tensor in rows.tensors().values():
                tensor.view(torch.uint8).max()  # every page
        print("open", flush=True)
        sys.stdin.readline()
    return told


class Child:
    """A process that opens a memory, with a record of its own of which files were checked."""

    def __init__(self, folder: Path, cache: Path, *more: str):
        command = [sys.executable, __file__, "--open", str(folder), *more]
        environment = os.environ | {"KNNMOE_CACHE": str(cache)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def result(self) -> dict:
        """What `opened` returned."""
        output, _ = self.process.communicate("\n")
        if self.process.returncode:
            raise RuntimeError(f"opening failed with {self.process.returncode}")
        return json.loads(output.splitlines()[-1])


def measure(model: nn.Module, rows: int, scratch: Path, options: argparse.Namespace) -> dict:
    """One size: the first opening, two later ones, attaching."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder, cache = Path(name) / "memory", Path(name) / "cache"
        size = save_memory(model, rows, folder)
        found = {"rows": rows, "layers": options.layers, "bytes": size}
        found["first"], *found["later"] = [Child(folder, cache).result() for _ in range(3)]
        engine = ["--engine", options.engine]
        if options.attach_rows is None or rows <= options.attach_rows:
            attach = ["--attach", str(options.layers), *engine]
            found["attached"], found["attached_again"] = (Child(folder, cache, *attach).result() for _ in range(2))
        if options.share:
            found["shared"] = _shared(folder, cache)
    return found


def _shared(folder: Path, cache: Path) -> list[dict[str, int]]:
    """Of one process that has read all of a memory, and of each of two at a time."""
    children, found = [], []
    for _ in range(2):
        children.append(Child(folder, cache, "--wait"))
        children[-1].process.stdout.readline()
        found.append([mapped(child.process.pid) for child in children])
    for child in children:
        child.result()
    return [found[0][0], *found[1]]


def report(content: dict) -> str:
    """The tables."""
    found = content["settings"]
    head = (
        f"Written by `benchmarks/loading.py`: {found[0]['layers']} layers, default storage, engine "
        f"{content['options']['engine']}. {shown_hardware(content['hardware'])}. MB are 10^6 bytes."
    )
    header = ["rows a layer", "MB on disk", "first opening, s", "later, s", "anonymous, mapped MB after a later one"]
    header += ["peak MB of the process: first, later", "attaching, s", "again, s", "anonymous, mapped MB then"]
    lines = []
    for one in found:
        later, attached = one["later"][-1], one.get("attached_again")
        cells = [f"{one['rows']:,}", f"{one['bytes'] / 1e6:.0f}", f"{one['first']['seconds']:.2f}"]
        cells += [f"{later['seconds']:.3f}", _megabytes(later["anonymous"], later["mapped"])]
        cells.append(_megabytes(one["first"]["peak"], later["peak"]))
        if attached is not None:
            cells += [f"{one[turn]['attach_seconds']:.2f}" for turn in ("attached", "attached_again")]
            cells.append(_megabytes(attached["attach_anonymous"], attached["attach_mapped"]))
        lines.append(cells + [""] * (len(header) - len(cells)))
    fits = [[name, shown_growth(fit)] for name, fit in content["growth"].items()]
    parts = [head, markdown(header, lines), "Growth with the rows.\n\n" + markdown(["what", "rows ^ a"], fits)]
    if "shared" in found[-1]:
        alone, *both = found[-1]["shared"]
        parts.append(
            f"Pages of the largest memory that a process has read, and its share of them: alone "
            f"{_megabytes(alone['Rss'], alone['Pss'])} MB; each of two, "
            f"{'; '.join(_megabytes(one['Rss'], one['Pss']) for one in both)} MB."
        )
    return "\n\n".join(parts)


def _megabytes(*values: int) -> str:
    return ", ".join(f"{value / 1e6:.1f}" for value in values)


def _growth(found: list[dict], cost: Callable[[dict], float]) -> Growth | None:
    return growth([one["rows"] for one in found], [cost(one) for one in found])


def run(options: argparse.Namespace) -> None:
    """Every size, written after each."""
    model = small_model(options.layers)
    plan = plan_memory(MODEL, 10**6, KNNMoEConfig())
    most = int(options.gigabytes * 1e15 / options.layers / (plan.nbytes / len(plan.gates)))
    told = {name: value for name, value in vars(options).items() if name not in ("results", "folder")}
    content = {"hardware": hardware(torch.device("cpu")), "options": told, "settings": []}
    for part in PARTS:
        content["settings"].append(measure(model, max(1, int(part * most)), options.folder, options))
        found = content["settings"]
        content["growth"] = {
            "first opening": _growth(found, lambda one: one["first"]["seconds"]),
            "later opening": _growth(found, lambda one: one["later"][-1]["seconds"]),
            "attaching": _growth(
                [one for one in found if "attached" in one], lambda one: one["attached"]["attach_seconds"]
            ),
        }
        write(options.results, "loading", content, report(content))
    print(report(content))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gigabytes", type=float, default=2.0, help="of the largest memory; default 2")
    add("--layers", type=int, default=PUBLISHED[MODEL].num_hidden_layers, help="default 16")
    add("--engine", choices=SEARCH_BACKENDS, default=KNNMoEConfig().search_backend, help="that attaching builds")
    add("--attach-rows", type=int, help="attach none of more rows a layer; default: all are attached")
    add("--share", action=argparse.BooleanOptionalAction, default=True, help="two processes with the same memory")
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where memories are saved for the time")
    add("--results", type=Path, default=FOLDER, help="folder of loading.json and loading.md")
    for name, kind in (("--open", str), ("--attach", int)):
        add(name, type=kind, default=None, help=argparse.SUPPRESS)  # of the processes that this one starts
    add("--wait", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.open is not None:
        print(json.dumps(opened(options.open, options.attach or 0, options.engine, options.wait)))
    else:
        run(options)


if __name__ == "__main__":
    main()
