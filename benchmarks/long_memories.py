"""How the time of a lookup inside a model grows with the rows: memories of several lengths in turns, in one process.

    python benchmarks/long_memories.py --rows 100000 1000000

`overhead.py` measures one length after the other, minutes apart, in which a shared machine changes its pace. Here each
turn attaches every memory, from the index that was kept when it was attached first, and times its lookups in the
prefill of a prompt and in decoding after it. Ratios are of the medians of a turn, with the first length. Writes
`benchmarks/results/long_memories.md` and `.json`.
"""

import argparse
import copy
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it knows only its own folder

import torch

from benchmarks.in_model import lookups_within
from benchmarks.measuring import hardware, median, ratio, shown_hardware, write
from benchmarks.report import markdown
from benchmarks.results import FOLDER
from benchmarks.synthetic import first_rows, memory_of, random_model, random_text, synthetic_layers
from knnmoe_hf import KNNMoEConfig, RoutingMemory, attach_memory, detach_memory
from knnmoe_hf.memory.size import PUBLISHED
from knnmoe_hf.models.gates import find_gates

MODEL, LENGTH, REFERENCES, STEPS = "allenai/OLMoE-1B-7B-0924", 256, 4096, 9


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[int, list[float]]]:
    """Microseconds of a lookup, the median of each turn, by what the model does and the rows."""
    config = copy.deepcopy(PUBLISHED[MODEL])
    config.num_hidden_layers = options.layers
    model = random_model(config, torch.device("cpu"), torch.bfloat16)
    lexicon = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(0))[:REFERENCES]
    stored = random_text(lexicon, REFERENCES // LENGTH, LENGTH, 0)
    prompt, decoded = random_text(lexicon, 1, LENGTH, 1), random_text(lexicon, 1, STEPS, 2)
    layers = synthetic_layers(model, stored, max(options.rows), KNNMoEConfig())
    memories = {}
    for rows in options.rows:
        fewer = {layer: first_rows(table, rows, KNNMoEConfig()) for layer, table in layers.items()}
        memory_of(fewer, find_gates(model), KNNMoEConfig()).save_pretrained(folder / str(rows))
        memories[rows] = RoutingMemory.from_pretrained(folder / str(rows))
    found = {name: {rows: [] for rows in options.rows} for name in ("decode", "prefill")}
    for turn in range(-1, options.turns):  # the first builds the indexes
        for rows, memory in memories.items():
            attach_memory(model, memory)
            for name, spent in lookups_within(model, prompt, decoded).items():
                if turn >= 0:
                    found[name][rows].append(1e6 * median(spent))
            detach_memory(model)
    return found


def report(content: dict) -> str:
    """A table."""
    lines = []
    for name, by_rows in content["microseconds"].items():
        first = next(iter(by_rows.values()))
        for rows, spent in by_rows.items():
            value, low, high = ratio([[one] for one in first], [[one] for one in spent])
            shown = f"{value:.2f} [{low:.2f}, {high:.2f}]"
            lines.append([name, f"{rows:,}", f"{median(spent):.0f}", shown, f"{min(spent):.0f} to {max(spent):.0f}"])
    header = ["", "rows a layer", "a layer's lookup, us", "times the first", "range over turns"]
    return (
        f"Written by `benchmarks/long_memories.py`: {content['layers']} layers of {MODEL}'s size, {LENGTH} tokens in "
        f"prefill, {content['turns']} turns. {shown_hardware(content['hardware'])}.\n\n{markdown(header, lines)}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="in each layer")
    parser.add_argument("--layers", type=int, default=6, help="default 6")
    parser.add_argument("--turns", type=int, default=12, help="default 12")
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of long_memories.json and .md")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, KNNMOE_CACHE=f"{folder}/cache"):
        found = measure(options, Path(folder))
    content = {"hardware": hardware(torch.device("cpu")), "layers": options.layers, "turns": options.turns}
    content["microseconds"] = found
    write(options.results, "long_memories", content, report(content))
    print(report(content))


if __name__ == "__main__":
    main()
