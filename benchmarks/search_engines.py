"""Search by itself: queries per second, recall, bytes and build time of every engine, and how they grow.

    OMP_NUM_THREADS=1 python benchmarks/search_engines.py
    python benchmarks/search_engines.py --engines torch --rows 10000 --dims 48 --seconds 0.1     # to see that it runs

Queries are the router inputs of a lab model on text that it was not built from, keys lie around its router inputs on
other text (benchmarks/synthetic.py says how), encoded as by default but for the number of dimensions. Exact neighbours
are those of the torch engine. Writes `benchmarks/results/search_engines.md` and `.json`, on a GPU
`search_engines-cuda.*`.
"""

import argparse
import gc
import sys
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it knows only its own folder

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.in_model import recall
from benchmarks.measuring import (
    growth,
    hardware,
    median,
    repeated,
    resident,
    shown_growth,
    shown_hardware,
    timed,
    write,
)
from benchmarks.report import markdown
from benchmarks.results import FOLDER
from benchmarks.synthetic import router_inputs, synthetic_rows
from knnmoe_hf import KNNMoEConfig
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents, windows
from knnmoe_hf.lookup.options import SEARCH_BACKENDS
from knnmoe_hf.models.gates import find_gates, gate_logits
from knnmoe_hf.search import StoredKeys, build_engine
from knnmoe_hf.search.exact import TorchSearch


class Inputs:
    """Router inputs and logits of one layer of a lab model: those that rows lie around, and those that ask."""

    def __init__(self, options: argparse.Namespace):
        folder = LAB_MODELS[options.lab]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        gate = find_gates(model)[options.layer]
        self.sides: list[tuple[Tensor, Tensor]] = []  # x (T, d) and logits (T, E): stored, asked
        for split, tokens in (("reference", options.references), ("test", options.queries)):
            length = min(256, tokens)
            text = torch.tensor(windows(documents("topics", split), tokenizer, limit=tokens // length, length=length))
            x = router_inputs(model, text)[gate.layer]
            self.sides.append((x, gate_logits(gate, x)))

    def keys_and_queries(self, rows: int, dims: int, device: torch.device) -> tuple[StoredKeys, Tensor]:
        """So many rows of so many dimensions, and encoded queries (T, c)."""
        stored, asked = self.sides
        table = synthetic_rows(*stored, rows, KNNMoEConfig(key_dim=dims), seed=0)
        return table.stored_keys.to(device), table.encoder.query(*asked).to(device)


def measure(keys: StoredKeys, queries: Tensor, engine: str, options: argparse.Namespace) -> dict:
    """One engine over keys (N, c): what it takes to make, what it finds of what there is, and how fast."""
    config, device = KNNMoEConfig(search_backend=engine), keys.codes.device
    k = config.num_neighbors
    gc.collect()
    held, made = resident(), []
    seconds = timed(lambda: made.append(build_engine(keys, config)), device)
    searched = made[0].search(queries, k)
    found = {"engine": engine, "engine_class": type(made[0]).__name__, "rows": len(keys), "dims": keys.width}
    found |= {"build_seconds": seconds, "index_bytes": made[0].nbytes, "resident_bytes": resident() - held}
    found["recall"] = recall(queries, keys, TorchSearch(keys, config).search(queries, k).rows, searched.rows)
    found["batches"] = []
    for batch in options.batches:
        blocks = cycle([block for block in queries.split(batch) if len(block) == batch])
        spent = repeated(lambda blocks=blocks: made[0].search(next(blocks), k), device, options.seconds)
        found["batches"].append({"batch": batch, "seconds": median(spent), "per_second": batch / median(spent)})
    return found


def growths(found: list[dict]) -> list[dict]:
    """How each engine's seconds grow with rows, dimensions and tokens at once, the other two being the largest."""
    told = []
    for engine in dict.fromkeys(one["engine"] for one in found):
        own = [one for one in found if one["engine"] == engine]
        last = max(own, key=lambda one: (one["rows"], one["dims"]))
        over_rows = [one for one in own if one["dims"] == min(one["dims"] for one in own)]
        over_dims = [one for one in own if one["rows"] == last["rows"]]
        fits = {"build with rows": growth(*_series(over_rows, "rows", "build_seconds"))}
        for index, one in enumerate(last["batches"]):
            for name, some in (("rows", over_rows), ("dims", over_dims)):
                seconds = [single["batches"][index]["seconds"] for single in some]
                fits[f"batch {one['batch']} with {name}"] = growth([single[name] for single in some], seconds)
        fits["search with batch"] = growth(*_series(last["batches"], "batch", "seconds"))
        told.append({"engine": engine, "fits": fits})
    return told


def _series(found: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    return [one[x] for one in found], [one[y] for one in found]


def report(content: dict) -> str:
    """The tables."""
    found, options = content["settings"], content["options"]
    head = (
        f"Written by `benchmarks/search_engines.py`: {options['queries']} queries, rows around "
        f"{options['references']} router inputs of layer {options['layer']} of the lab model {options['lab']}, int8 "
        f"codes, recall at {KNNMoEConfig().num_neighbors}. {shown_hardware(content['hardware'])}."
    )
    batches = [one["batch"] for one in found[0]["batches"]]
    header = ["engine", "rows", "dimensions", *(f"queries/s, {n} at once" for n in batches), "recall"]
    header += ["index bytes a row", "resident bytes a row", "build, s"]
    lines = []
    for one in found:
        cells = [one["engine"], f"{one['rows']:,}", str(one["dims"])]
        cells += [f"{batch['per_second']:,.0f}" for batch in one["batches"]]
        cells += [f"{one['recall']:.4f}", f"{one['index_bytes'] / one['rows']:.1f}"]
        lines.append([*cells, f"{one['resident_bytes'] / one['rows']:.0f}", f"{one['build_seconds']:.2f}"])
    names = list(content["growth"][0]["fits"])
    fits = [[one["engine"], *(shown_growth(one["fits"][name]) for name in names)] for one in content["growth"]]
    note = "Growth of the seconds, `x ^ a`; with rows at the fewest dimensions, else at the largest sizes."
    return "\n\n".join([head, markdown(header, lines), note, markdown(["engine", *names], fits)])


def run(options: argparse.Namespace) -> None:
    """Every setting, written after each."""
    device, inputs = torch.device(options.device), Inputs(options)
    told = {name: value for name, value in vars(options).items() if name != "results"}
    content = {"hardware": hardware(device), "options": told, "settings": []}
    for dims in options.dims:
        keys, queries = inputs.keys_and_queries(max(options.rows), dims, device)
        for rows in options.rows:
            for engine in options.engines:
                some = StoredKeys(keys.codes[:rows], keys.step)
                content["settings"].append(measure(some, queries, engine, options))
                content["growth"] = growths(content["settings"])
                name = "search_engines" if device.type == "cpu" else "search_engines-cuda"
                write(options.results, name, content, report(content))
                print(engine, f"{rows:,} rows, {dims} dimensions: done", file=sys.stderr, flush=True)
    print(report(content))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--engines", nargs="+", choices=SEARCH_BACKENDS, default=list(SEARCH_BACKENDS))
    add("--rows", type=int, nargs="+", default=[10_000, 100_000, 200_000, 1_000_000])
    add("--dims", type=int, nargs="+", default=[48, 64, 128])
    add("--batches", type=int, nargs="+", default=[1, 16, 256], help="queries at once")
    add("--lab", choices=LAB_MODELS, default="olmoe")
    add("--layer", type=int, default=2, help="of the lab model; default 2")
    add("--references", type=int, default=4096, help="router inputs that rows lie around; default 4096")
    add("--queries", type=int, default=1024, help="default 1024")
    add("--seconds", type=float, default=1.0, help="for each timing; default 1")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, help="of torch; its own choice by default")
    add("--results", type=Path, default=FOLDER, help="folder of search_engines.json and search_engines.md")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
