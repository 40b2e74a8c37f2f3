"""
Search engines beside their peers: faiss and hnswlib called as their own users call them, and our engines.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.engines
    OMP_NUM_THREADS=1 python -m benchmarks.speed.engines --rows 5000 --rounds 2       # to see that it runs

Keys lie around the router inputs of a lab model, queries are its router inputs on text that the keys do not come from;
both are encoded as in a memory of the default configuration. All run on one thread, in turns within each round. Peers
get the least `nprobe` or `ef` that reaches a recall on other queries than those that are measured. Writes
`benchmarks/results/search_engines.json` and `.md`.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import hnswlib
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnmoe_hf import KNNMoEConfig
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents, windows
from knnmoe_hf.lookup.codecs import fit_keys
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.search import SearchOptions, StoredKeys, build_engine

RESULTS = Path(__file__).resolve().parents[1] / "results"
K, BATCH, SINGLES = 16, 256, 100
LAYER = 2
SPREAD = 0.2  # of keys around router inputs, in standard deviations: neighbours are as far as among real rows
RECALLS = (0.97, 0.985)
FAISS = ("IVF1024,SQ8", "IVF2048,SQ8", "IVF1024,Flat", "IVF2048,Flat", "IVF1024,PQ48x4fs,RFlat")
EFFORTS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
OURS = ("ivf", "faiss", "hnsw", "torch")


@dataclass
class Contender:
    """
    One way to search.

    Attributes:
        name: shown in the table.
        search: of queries as the contender takes them, to distances and rows (T, K), in this order or `rows_first`.
        as_input: from a tensor of queries to what `search` takes.
        index_bytes: of the index, for all rows.
        build_seconds: to make it.
        wraps: name of the contender that calls the same index directly.
    """

    name: str
    search: Callable
    as_input: Callable
    index_bytes: int
    build_seconds: float
    wraps: str | None = None
    prepare: Callable[[], object] = lambda: None
    recall: float = 0.0
    seconds: dict[int, list[float]] = field(default_factory=lambda: {1: [], BATCH: []})  # a query, for each round


def keys_and_queries(rows: int) -> tuple[StoredKeys, Tensor]:
    """Int8 keys (rows, 48), and queries (2048, 48) float32."""
    model = AutoModelForCausalLM.from_pretrained(LAB_MODELS["olmoe"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(LAB_MODELS["olmoe"])
    centres, asked = (_router_inputs(model, tokenizer, *split) for split in (("reference", 4096), ("test", 2048)))
    config, unused = KNNMoEConfig(), torch.zeros(len(centres), 1)
    encoder = fit_keys(centres, unused, config.key_codec, config.key_dim, config.key_whitening, torch.int8)
    generator = torch.Generator().manual_seed(0)
    places = encoder.query(centres, unused)
    ids = torch.randint(len(places), (rows,), generator=generator)
    keys = places[ids] + SPREAD * places.std(dim=0) * torch.randn(rows, places.shape[1], generator=generator)
    return StoredKeys((keys / encoder.step).round().clamp(-127, 127).to(torch.int8), encoder.step), encoder.query(
        asked, unused
    )


@torch.no_grad()
def _router_inputs(model, tokenizer, split: str, count: int) -> Tensor:
    """(count, d), the inputs of one gate while the model reads a split of the lab's text."""
    gate, seen = find_gates(model)[LAYER], []
    hook = gate.module.register_forward_hook(lambda _, args, __: seen.append(args[0].flatten(0, -2)))
    for row in torch.tensor(windows(documents("topics", split), tokenizer, limit=count // 256, length=256)):
        model(input_ids=row[None])
    hook.remove()
    return torch.cat(seen)


def recall(rows: np.ndarray | Tensor, exact: Tensor) -> float:
    """Share of the exact neighbours (T, K) that are among these rows (T, K)."""
    rows = torch.as_tensor(np.asarray(rows).astype(np.int64))
    return (exact[:, :, None] == rows[:, None]).any(dim=-1).double().mean().item()


def tuned(rows_at: Callable[[int], np.ndarray], exact: Tensor) -> list[int]:
    """The least efforts that reach each of `RECALLS`."""
    found = []
    for target in RECALLS:
        found += [next((effort for effort in EFFORTS if recall(rows_at(effort), exact) >= target), EFFORTS[-1])]
    return sorted(set(found))


def faiss_contenders(keys: StoredKeys, queries: np.ndarray, exact: Tensor) -> Iterator[Contender]:
    """faiss, called directly."""
    table = keys.floats(slice(None)).numpy()
    for factory in FAISS:
        started = time.process_time()
        index = faiss.index_factory(table.shape[1], factory)
        index.train(table)
        index.add(table)
        spent, size = time.process_time() - started, len(faiss.serialize_index(index))
        lists = faiss.extract_index_ivf(index)
        if factory.endswith("RFlat"):
            index.k_factor = 4

        def probing(nprobe: int, index=index, lists=lists) -> np.ndarray:
            lists.nprobe = nprobe
            return index.search(queries, K)[1]

        for nprobe in tuned(probing, exact):
            yield Contender(
                f"faiss {factory}, nprobe {nprobe}",
                lambda some, index=index: index.search(some, K),
                Tensor.numpy,
                size,
                spent,
                prepare=lambda lists=lists, nprobe=nprobe: setattr(lists, "nprobe", nprobe),
            )


def hnsw_contenders(keys: StoredKeys, queries: np.ndarray, exact: Tensor) -> Iterator[Contender]:
    """hnswlib, called directly."""
    table = keys.floats(slice(None)).numpy()
    started = time.process_time()
    index = hnswlib.Index(space="l2", dim=table.shape[1])
    index.init_index(max_elements=len(table), M=16, ef_construction=200)
    index.add_items(table, num_threads=1)
    spent = time.process_time() - started

    def search(some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return index.knn_query(some, k=K, num_threads=1)[::-1]

    def searching(ef: int) -> np.ndarray:
        index.set_ef(max(K, ef))
        return search(queries)[1]

    for ef in tuned(searching, exact):
        yield Contender(
            f"hnswlib, M 16, ef {ef}",
            search,
            Tensor.numpy,
            index.index_file_size(),
            spent,
            prepare=lambda ef=ef: index.set_ef(ef),
        )


def our_contenders(keys: StoredKeys) -> Iterator[Contender]:
    """Our engines through `SearchEngine.search`; for faiss and hnsw also their own index, called directly."""
    for backend in OURS:
        started = time.process_time()
        engine = build_engine(keys, SearchOptions(search_backend=backend))
        spent, name = time.process_time() - started, f"knnmoe_hf {backend} ({type(engine).__name__})"
        direct = None
        if backend == "faiss":
            direct = f"the same index, called directly: IVF{engine.index.nlist},SQ8, nprobe {engine.index.nprobe}"
            yield Contender(direct, lambda some, i=engine.index: i.search(some, K), Tensor.numpy, engine.nbytes, spent)
        if backend == "hnsw":
            direct = "the same graph, called directly: M 16, ef 64"
            yield Contender(
                direct,
                lambda some, i=engine.index: i.knn_query(some, k=K, num_threads=1)[::-1],
                Tensor.numpy,
                engine.nbytes,
                spent,
                prepare=lambda i=engine.index: i.set_ef(64),
            )
        yield Contender(name, lambda some, e=engine: e.search(some, K), lambda t: t, engine.nbytes, spent, direct)


def measure(contenders: list[Contender], queries: Tensor, exact: Tensor, rounds: int) -> None:
    """Recall of each, and seconds a query in rounds in which all take turns."""
    for one in contenders:
        one.prepare()
        one.recall = recall(one.search(one.as_input(queries))[1], exact)
    for number in range(rounds):
        start = number * SINGLES % (len(queries) - max(SINGLES, BATCH) + 1)
        for one in contenders:
            one.prepare()
            singles = [one.as_input(query) for query in queries[start : start + SINGLES].split(1)]
            batch = one.as_input(queries[start : start + BATCH])
            for size, parts in ((1, singles), (BATCH, [batch])):
                one.search(parts[0])  # not counted
                started = time.thread_time()  # other processes may use the machine
                for part in parts:
                    one.search(part)
                one.seconds[size].append((time.thread_time() - started) / (len(parts) * size))


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, and the quartiles."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float(middle), float(low), float(high)


def results(contenders: list[Contender], rows: int) -> list[dict]:
    """One entry for each contender."""
    by_name, found = {one.name: one for one in contenders}, []
    for one in contenders:
        entry = {"name": one.name, "recall": one.recall, "bytes_per_row": one.index_bytes / rows}
        entry |= {"build_seconds": one.build_seconds, "seconds": one.seconds}
        for size, seconds in one.seconds.items():
            entry[f"per_second_{size}"] = spread([1 / value for value in seconds])
            if one.wraps is not None:
                direct = by_name[one.wraps].seconds[size]
                entry[f"ratio_{size}"] = statistics.median(a / b for a, b in zip(seconds, direct))
        found.append(entry)
    return found


def report(content: dict) -> str:
    """The page."""
    lines = [
        "# Search engines beside their peers",
        "",
        f"Written by `python -m benchmarks.speed.engines`: {content['rows']:,} rows of 48 int8 axes, k {K}, one "
        f"thread, {content['rounds']} interleaved rounds, on {content['hardware']}. Queries per second of CPU time "
        "are medians with their quartiles. `over direct` is the median ratio, round by round, of an engine's time to "
        "that of the same index called directly. Peers hold a copy of the keys; `ivf` and `torch` read the memory's "
        "own, of 48 bytes a row.",
        "",
        f"| engine | recall | queries/s, one at a time | queries/s, {BATCH} at once | over direct, one / {BATCH} | "
        "index bytes a row | build, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in content["engines"]:
        rates = ["{:,.0f} [{:,.0f}, {:,.0f}]".format(*one[f"per_second_{size}"]) for size in (1, BATCH)]
        ratio = f"{one['ratio_1']:.2f} / {one[f'ratio_{BATCH}']:.2f}" if "ratio_1" in one else ""
        cells = [one["name"], f"{one['recall']:.4f}", *rates, ratio, f"{one['bytes_per_row']:.1f}"]
        lines.append("| " + " | ".join([*cells, f"{one['build_seconds']:.1f}"]) + " |")
    return "\n".join(lines) + "\n"


def hardware() -> str:
    """Processor and versions, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    versions = f"PyTorch {torch.__version__}, faiss {faiss.__version__}"
    return f"{next(names, platform.machine())} ({torch.backends.cpu.get_cpu_capability()}), {versions}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="default 100000")
    parser.add_argument("--rounds", type=int, default=40, help="default 40")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of search_engines.json and .md")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    keys, queries = keys_and_queries(options.rows)
    tuning, queries = queries[::2].contiguous(), queries[1::2].contiguous()
    exact_engine = build_engine(keys, SearchOptions(search_backend="torch"))
    exact_tuning, exact = (exact_engine.search(some, K).rows for some in (tuning, queries))
    peers = (peer(keys, tuning.numpy(), exact_tuning) for peer in (faiss_contenders, hnsw_contenders))
    contenders = [*our_contenders(keys), *(one for some in peers for one in some)]
    measure(contenders, queries, exact, options.rounds)
    content = {"rows": options.rows, "rounds": options.rounds, "hardware": hardware()}
    content["engines"] = results(contenders, options.rows)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "search_engines.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.results / "search_engines.md").write_text(report(content))
    print(report(content))


if __name__ == "__main__":
    main()
