"""Opening a saved memory: seconds and bytes against its size, and what processes that open the same memory share.

    python -m benchmarks.speed.loading --gigabytes 2
    python -m benchmarks.speed.loading --gigabytes 10 --attach-rows 300000

Memories of OLMoE-1B-7B's hidden size, experts and layers are saved, and each is opened in a process of its own: for
the first time, with its files out of the page cache where the system allows that, which reads and checks every byte;
and again, which maps the files and reads none of them. Anonymous memory is the process's own; mapped is what of the
files it has touched, which the system may drop and processes share. Attaching builds the search engine of every layer,
on a float32 model with small experts; attaching again, in another process, reads the index from the cache.
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.pages import RESULTS, parser, provenance, shown_provenance, table, write
from benchmarks.speed.measuring import growth, resident
from benchmarks.speed.synthetic import first_rows, memory_of, random_model, synthetic_rows
from knnmoe_hf import KNNMoEConfig, RoutingMemory, attach_memory
from knnmoe_hf.lookup.options import SEARCH_BACKENDS
from knnmoe_hf.memory.size import PUBLISHED, plan_memory
from knnmoe_hf.models.gates import find_gates

MODULE, MODEL = "benchmarks.speed.loading", "allenai/OLMoE-1B-7B-0924"
PARTS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Sizes that are measured, of the largest memory."""


def small_model(layers: int) -> nn.Module:
    """A model with gates of full size and everything else as small as possible."""
    config = copy.deepcopy(PUBLISHED[MODEL])
    config.num_hidden_layers, config.num_key_value_heads = layers, 1
    config.intermediate_size, config.vocab_size = 16, 64
    return random_model(config, torch.device("cpu"), torch.float32)


def save_memory(model: nn.Module, rows: int, folder: Path) -> int:
    """Saves a memory with the same rows in each layer; bytes of its files, which leave the page cache if possible."""
    config, gates = KNNMoEConfig(), find_gates(model)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, gates[0].hidden_size, generator=generator)
    logits = torch.randn(256, gates[0].num_experts, generator=generator)
    layer = first_rows(synthetic_rows(x, logits, rows, config, seed=0), rows, config)
    layers = {gate.layer: copy.deepcopy(layer) for gate in gates}  # safetensors refuses tensors that share storage
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
    """
    Opens a memory in this process, and says what that took.

    Args:
        folder: of the memory.
        attach: attach it to a model of so many layers; 0 for not at all.
        engine: the search backend.
        wait: read every page, print a line and wait for one, so that the process can be looked at from outside.
    """
    model = small_model(attach) if attach else None
    held, started = resident(), time.perf_counter()
    memory = RoutingMemory.from_pretrained(folder, search_backend=engine)
    found = {"seconds": time.perf_counter() - started, "rows": len(memory), "anonymous": resident() - held}
    found |= {"peak": resident("VmHWM"), "mapped": mapped()["Rss"]}
    if attach:
        started = time.perf_counter()
        attach_memory(model, memory)
        found |= {"attach_seconds": time.perf_counter() - started, "attach_anonymous": resident() - held}
        found["attach_mapped"] = mapped()["Rss"]
    if wait:
        for rows in memory.layers.values():
            for tensor in rows.tensors().values():
                tensor.view(torch.uint8).max()  # every page
        print("open", flush=True)
        sys.stdin.readline()
    return found


class Child:
    """A process that runs `opened`, with a cache of its own of which files were checked."""

    def __init__(self, folder: Path, cache: Path, *more: str):
        command = [sys.executable, "-m", MODULE, "--open", str(folder), *more]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=RESULTS.parents[1], env=os.environ | {"KNNMOE_CACHE": str(cache)},
            stdin=pipe, stdout=pipe, text=True,
        )  # fmt: skip

    def result(self) -> dict:
        """What `opened` returned."""
        output, _ = self.process.communicate("\n")
        if self.process.returncode:
            raise RuntimeError(f"opening the memory failed with exit status {self.process.returncode}.")
        return json.loads(output.splitlines()[-1])


def measure(model: nn.Module, rows: int, options) -> dict:
    """One size: the first opening, two later ones, attaching twice, two processes at once."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, cache = Path(name) / "memory", Path(name) / "cache"
        found = {"rows": rows, "layers": options.layers, "bytes": save_memory(model, rows, folder)}
        found["first"], *found["later"] = [Child(folder, cache).result() for _ in range(3)]
        if options.attach_rows is None or rows <= options.attach_rows:
            attach = ["--attach", str(options.layers), "--engine", options.engine]
            found["attached"], found["attached_again"] = (Child(folder, cache, *attach).result() for _ in range(2))
        if options.share:
            found["shared"] = _shared(folder, cache)
    return found


def _shared(folder: Path, cache: Path) -> list[dict[str, int]]:
    """`mapped` of a process that has read all of a memory; then of both of two such processes at once."""
    children, found = [], []
    for _ in range(2):
        children.append(Child(folder, cache, "--wait"))
        children[-1].process.stdout.readline()
        found.append([mapped(child.process.pid) for child in children])
    for child in children:
        child.result()
    return [found[0][0], *found[1]]


def report(content: dict) -> str:
    """The page."""
    found = content["settings"]
    setup = f"{found[0]['layers']} layers, default storage, engine {content['engine']}. MB are 10^6 bytes."
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
    parts = [shown_provenance(content["made"]), setup, table(header, lines), _growths(found)]
    if "shared" in found[-1]:
        alone, *both = found[-1]["shared"]
        parts.append(
            f"Pages of the largest memory that a process has read, and its share of them: alone "
            f"{_megabytes(alone['Rss'], alone['Pss'])} MB; each of two, "
            f"{'; '.join(_megabytes(one['Rss'], one['Pss']) for one in both)} MB."
        )
    return "\n\n".join(parts)


def _growths(found: list[dict]) -> str:
    attached = [one for one in found if "attached" in one]
    series = {
        "first opening": (found, lambda one: one["first"]["seconds"]),
        "later opening": (found, lambda one: one["later"][-1]["seconds"]),
        "attaching": (attached, lambda one: one["attached"]["attach_seconds"]),
    }
    lines = []
    for name, (some, seconds) in series.items():
        fit = growth([one["rows"] for one in some], [seconds(one) for one in some])
        lines.append([name, str(fit or "one point")])
    return "Growth of the seconds with the rows.\n\n" + table(["", "rows ^ a"], lines)


def _megabytes(*values: int) -> str:
    return ", ".join(f"{value / 1e6:.1f}" for value in values)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--gigabytes", type=float, default=2.0, help="of the largest memory; default 2")
    add("--layers", type=int, default=PUBLISHED[MODEL].num_hidden_layers, help="default 16")
    add("--engine", choices=SEARCH_BACKENDS, default=KNNMoEConfig().search_backend, help="that attaching builds")
    add("--attach-rows", type=int, help="attach no memory of more rows a layer; default: all are attached")
    add("--no-share", dest="share", action="store_false", help="leave out the two processes with the same memory")
    add("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where memories are saved meanwhile")
    for name in ("--open", "--attach", "--wait"):  # of the processes that this one starts
        add(name, help="internal", **({"action": "store_true"} if name == "--wait" else {}))
    options = options.parse_args(argv)
    if options.open is not None:
        print(json.dumps(opened(options.open, int(options.attach or 0), options.engine, options.wait)))
        return
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model, plan = small_model(options.layers), plan_memory(MODEL, 10**6, KNNMoEConfig())
    most = int(options.gigabytes * 1e15 / options.layers / (plan.nbytes / len(plan.gates)))
    content = {"made": provenance(MODULE, argv), "engine": options.engine, "settings": []}
    for part in PARTS:
        content["settings"].append(measure(model, max(1, int(part * most)), options))
        write(options.results, "loading", content, report(content))
    print(report(content))


if __name__ == "__main__":
    main()
