"""What a memory costs a model of full size: decode, prefill, bytes and recall against the frozen model, in one run.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py --rows 10000 200000 1000000 --engines auto
    python benchmarks/overhead.py --layers 2 --rows 10000 --rounds 2        # a minute, to see that it runs

The model has the published sizes and random weights (OLMoE: 14 GB in bf16), the memory rows around the router inputs
of random text (benchmarks/synthetic.py says how, and why they lie as they do); every option of the memory but the
engine is the default. Base and memory run in turns in one process, on the same tokens. Steps of a lookup are timed by
themselves, one layer after the other, on what the step before gives; caches are warmer than in the model, whose own
figure is beside them. Writes `benchmarks/results/overhead.md` and `.json`, on a GPU `overhead-cuda.*`.
"""

import argparse
import copy
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it knows only its own folder

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from benchmarks import lookup_alone
from benchmarks.in_model import SIDES, Rounds, decoding, lookups_within, prefilling, quality, seen_by_gates
from benchmarks.measuring import growth, hardware, median, ratio, resident, shown_growth, shown_hardware, timed, write
from benchmarks.report import markdown
from benchmarks.results import FOLDER
from benchmarks.synthetic import first_rows, memory_of, random_model, random_text, synthetic_layers
from knnmoe_hf import KNNMoEConfig, RoutingMemory, attach_memory, detach_memory
from knnmoe_hf.lookup.options import SEARCH_BACKENDS
from knnmoe_hf.memory.size import PUBLISHED
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.models.hooks import RoutingHooks


@dataclass(frozen=True)
class Texts:
    """Random text; what is stored, what is asked and what is timed have all words in common and no sequence."""

    stored: Tensor  # (windows, length)
    asked: Tensor  # (1, length)
    prompt: Tensor  # (1, length)
    decoded: Tensor  # (rounds + 1, steps)
    prefilled: dict[int, Tensor]  # {S: (rounds + 1, S)}

    @classmethod
    def draw(cls, vocabulary: int, options: argparse.Namespace, device: torch.device) -> "Texts":
        """Of the sizes that the command line asks for."""
        rounds, length = options.rounds + 1, options.length
        shapes = [(options.references // length, length), (1, length), (1, length), (rounds, options.steps)]
        lexicon = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[: options.references]
        drawn = [random_text(lexicon, *shape, seed).to(device) for seed, shape in enumerate(shapes)]
        prefilled = {n: random_text(lexicon, rounds, n, 100 + n).to(device) for n in options.prefill}
        return cls(*drawn, prefilled)


def measure(model: nn.Module, memory: RoutingMemory, texts: Texts, options: argparse.Namespace) -> dict:
    """One setting: all that is told of a memory while it is attached."""
    held = resident()
    attaching = timed(lambda: attach_memory(model, memory), model.device)
    try:
        inputs = seen_by_gates(model, texts.asked)[0]
        lookups = RoutingHooks.of(model).current.values()
        found = {
            "rows": len(memory),
            "engine": memory.config.search_backend,
            "engine_classes": sorted({type(lookup.engine).__name__ for lookup in lookups}),
            "attach_seconds": attaching,
            "bytes": sum(lookup.nbytes for lookup in lookups),
            "index_bytes": sum(lookup.engine.nbytes for lookup in lookups),
            "layers": len(lookups),
            "prompt_tokens": texts.prompt.shape[1],
        }
        found["quality"] = quality(model, memory, texts.asked)
        timings = {"decode": decoding(model, texts.prompt, texts.decoded, options.rounds)}
        for length, text in texts.prefilled.items():
            timings[f"prefill {length}"] = prefilling(model, text, options.rounds)
        found["forwards"] = {name: summary(rounds) for name, rounds in timings.items()}
        found["lookup_in_model"] = {
            name: 1e6 * median(spent) for name, spent in lookups_within(model, texts.prompt, texts.decoded[:1]).items()
        }
        found["lookup_alone"] = lookup_alone.measure(model, inputs, options.batches, options.seconds)
        found["resident_bytes"] = resident() - held
    finally:
        detach_memory(model)
    return found


def summary(rounds: Rounds) -> dict:
    """Medians in milliseconds, their ratio, and all timings."""
    seconds = {name: [value for one in rounds[name] for value in one] for name in SIDES}
    told = {f"{name}_ms": 1e3 * median(values) for name, values in seconds.items()}
    return told | {"ratio": ratio(rounds["base"], rounds["memory"]), "seconds": rounds}


def run(options: argparse.Namespace) -> None:
    """Every setting, written after each, so that a run that is cut short has told something."""
    device = torch.device(options.device)
    config = copy.deepcopy(PUBLISHED.get(options.model)) or AutoConfig.from_pretrained(options.model)
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    model = random_model(config, device, torch.bfloat16)
    texts = Texts.draw(config.vocab_size, options, device)
    layers = synthetic_layers(model, texts.stored, max(options.rows), KNNMoEConfig())
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    content = {
        "hardware": hardware(device),
        "model": {"name": options.model, "layers": config.num_hidden_layers, "dtype": "bfloat16", "bytes": held},
        "experts": model.config._experts_implementation,
        "attention": model.config._attn_implementation,
        "options": {name: value for name, value in vars(options).items() if name != "results"},
        "settings": [],
    }
    for rows in options.rows:
        fewer = {layer: first_rows(table, rows, KNNMoEConfig()) for layer, table in layers.items()}
        for engine in options.engines:
            memory = memory_of(fewer, find_gates(model), KNNMoEConfig(search_backend=engine))
            content["settings"].append(measure(model, memory, texts, options))
            content["growth_with_rows"] = growths(content["settings"])
            write(options.results, "overhead" if device.type == "cpu" else "overhead-cuda", content, report(content))
            print(engine, f"{rows:,} rows: done", file=sys.stderr, flush=True)
    print(report(content))


def growths(settings: list[dict]) -> dict:
    """`{engine: {what: growth with the rows}}`, of lookups in the model and alone, and of attaching."""
    found: dict[str, dict] = {}
    for engine in dict.fromkeys(setting["engine"] for setting in settings):
        own = [setting for setting in settings if setting["engine"] == engine]
        rows, told = [setting["rows"] for setting in own], {}
        told |= {f"{n}, in the model": [s["lookup_in_model"][n] for s in own] for n in own[0]["lookup_in_model"]}
        for index, one in enumerate(own[0]["lookup_alone"]["batches"]):
            told[f"batch {one['batch']}, alone"] = [s["lookup_alone"]["batches"][index]["whole"] for s in own]
        told["attach"] = [setting["attach_seconds"] for setting in own]
        told["bytes"] = [setting["bytes"] for setting in own]
        found[engine] = {name: growth(rows, values) for name, values in told.items()}
    return found


def report(content: dict) -> str:
    """The tables."""
    model, settings = content["model"], content["settings"]
    head = (
        f"Written by `benchmarks/overhead.py`: {model['name']}, {model['layers']} layers, random {model['dtype']} "
        f"weights of {model['bytes'] / 1e9:.2f} GB, experts {content['experts']}, attention {content['attention']}.\n"
        f"{shown_hardware(content['hardware'])}.\nMedians; ratios of paired timings, 95 % intervals of a bootstrap "
        f"over {content['options']['rounds']} rounds, base and memory in turns. Recall at 16 and distances are of the "
        "model's own queries; distances in mean squared distances of two rows."
    )
    parts = [head, _forwards(settings, model["bytes"]), _lookups(settings), _growths(content["growth_with_rows"])]
    layered = [
        [s["engine"], f"{s['rows']:,}", *(shown_growth(s["lookup_alone"][f"growth_with_{n}"]) for n in _OTHER)]
        for s in settings
    ]
    parts.append(markdown(["engine", "rows", *(f"lookup time with the {n}" for n in _OTHER)], layered))
    return "\n\n".join(parts)


_OTHER = {"batch": "tokens at once", "layers": "layers"}


def _forwards(settings: list[dict], model_bytes: int) -> str:
    kinds = list(settings[0]["forwards"])
    header = ["engine", "rows", *(f"{k}: base, memory ms (ratio)" for k in kinds), "recall: mean, worst layer"]
    header += ["bytes a row", "of them index", "of the model", "attach, s", "nearest, 16th", "confidence"]
    lines = []
    for s in settings:
        cells, recalls, places = [], s["quality"]["recall"], s["rows"] * s["layers"]
        for found in (s["forwards"][kind] for kind in kinds):
            value, low, high = found["ratio"]
            cells.append(f"{found['base_ms']:.1f}, {found['memory_ms']:.1f} ({value:.3f} [{low:.3f}, {high:.3f}])")
        cells.append(f"{sum(recalls) / len(recalls):.4f}, {min(recalls):.4f}")
        cells += [f"{s['bytes'] / places:.1f}", f"{s['index_bytes'] / places:.1f}"]
        cells += [f"{100 * s['bytes'] / model_bytes:.2f} %", f"{s['attach_seconds']:.1f}"]
        cells.append(", ".join(f"{median(s['quality'][name]):.3f}" for name in ("nearest", "last")))
        lines.append([s["engine"], f"{s['rows']:,}", *cells, f"{s['quality']['confidence']:.2f}"])
    return markdown(header, lines)


def _lookups(settings: list[dict]) -> str:
    header = ["engine", "rows", "tokens at once", "in the model", "alone", *lookup_alone.STEPS]
    lines = []
    for s in settings:
        within = {1: s["lookup_in_model"]["decode"], s["prompt_tokens"]: s["lookup_in_model"]["prefill"]}
        for one in s["lookup_alone"]["batches"]:
            told = [within.get(one["batch"]), one["whole"], *one["steps"].values()]
            cells = ["" if value is None else f"{value:.0f}" for value in told]
            lines.append([s["engine"], f"{s['rows']:,}", str(one["batch"]), *cells])
    return "Microseconds of one layer's lookup.\n\n" + markdown(header, lines)


def _growths(found: dict) -> str:
    names = list(next(iter(found.values())))
    lines = [[engine, *(shown_growth(told[name]) for name in names)] for engine, told in found.items()]
    return "Growth with the rows, `rows ^ a`.\n\n" + markdown(["engine", *names], lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, nargs="+", default=[10_000, 100_000, 200_000, 1_000_000], help="in each layer")
    add("--engines", nargs="+", choices=SEARCH_BACKENDS, default=[KNNMoEConfig().search_backend])
    add("--model", default="allenai/OLMoE-1B-7B-0924", help=f"a folder, or one of {', '.join(PUBLISHED)}")
    add("--layers", type=int, help="fewer than the model has, for a first try")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, help="of torch; its own choice by default")
    add("--rounds", type=int, default=10, help="turns of base and memory; default 10")
    add("--steps", type=int, default=8, help="decoding steps in a turn; default 8")
    add("--prefill", type=int, nargs="+", default=[256], help="tokens; default 256")
    add("--length", type=int, default=256, help="tokens of the prompt and of a stored window; default 256")
    add("--references", type=int, default=4096, help="tokens whose router inputs rows lie around; default 4096")
    add("--batches", type=int, nargs="+", default=[1, 16, 256], help="tokens at once, for lookups alone")
    add("--seconds", type=float, default=1.0, help="for each figure of lookups alone; default 1")
    add("--results", type=Path, default=FOLDER, help="folder of overhead.json and overhead.md")
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
