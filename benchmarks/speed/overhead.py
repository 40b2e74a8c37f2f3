"""What memories cost a full-size model: decode and prefill against the frozen model, bytes, recall.

    python -m benchmarks.speed.overhead --rows 200000 --layers 4 --rounds 7
    python -m benchmarks.speed.overhead --rows 10000 100000 1000000 --layers 4      # growth with the rows
    python -m benchmarks.speed.overhead --rows 200000 --engines auto faiss torch    # engines inside the model

The model has the published sizes and random weights, the memories rows around the router inputs of random text
(`benchmarks/speed/synthetic.py` says how). Base and all memories are attached to one model and take turns on the same
tokens, so that ratios are of neighbours in time. Every option of a memory but the engine is the default.

With `--layers`, the model has fewer layers than the published one, each with a memory. The output head is left out of
every timing, so that the ratio is the same for 4 layers as for 16 (a little more than with the head).
"""

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from benchmarks.pages import DTYPES, add_dtype, parser, provenance, shown_provenance, table, write
from benchmarks.speed.in_model import BASE, STEPS, decoding, lookups_in_turns, lookups_of, prefilling, quality
from benchmarks.speed.measuring import Ratio, median, ratio, timed
from benchmarks.speed.synthetic import first_rows, memory_of, random_model, random_text, synthetic_layers
from knnmoe_hf import KNNMoEConfig, attach_memory, detach_memory
from knnmoe_hf.lookup.options import SEARCH_BACKENDS
from knnmoe_hf.memory.size import PUBLISHED
from knnmoe_hf.models.gates import find_gates

MODULE = "benchmarks.speed.overhead"


@dataclass(frozen=True)
class Texts:
    """Random text of one lexicon: what is stored and what is timed share all words and no sequence."""

    stored: Tensor  # (windows, length)
    queries: Tensor  # (1, length)
    prompt: Tensor  # (1, length)
    decoded: Tensor  # (rounds + 1, steps)
    prefilled: dict[int, Tensor]  # {S: (rounds + 1, S)}

    @classmethod
    def draw(cls, vocabulary: int, options, device: torch.device) -> "Texts":
        """Of the sizes on the command line."""
        rounds, length = options.rounds + 1, options.length
        shapes = [(options.references // length, length), (1, length), (1, length), (rounds, options.steps)]
        lexicon = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[: options.references]
        drawn = [random_text(lexicon, *shape, seed).to(device) for seed, shape in enumerate(shapes)]
        prefilled = {n: random_text(lexicon, rounds, n, 100 + n).to(device) for n in options.prefill}
        return cls(*drawn, prefilled)


def attach_memories(model: nn.Module, texts: Texts, options) -> dict[str, dict]:
    """Attaches one memory for each number of rows and engine; what is known of each, by name."""
    layers, found = synthetic_layers(model, texts.stored, max(options.rows), KNNMoEConfig()), {}
    for rows, engine in itertools.product(options.rows, options.engines):
        config, name = KNNMoEConfig(search_backend=engine), f"{rows:,} rows, {engine}"
        fewer = {layer: first_rows(table, rows, config) for layer, table in layers.items()}
        memory = memory_of(fewer, find_gates(model), config)
        seconds = timed(lambda: attach_memory(model, memory, name), model.device)  # noqa: B023
        lookups = lookups_of(model, name).values()
        found[name] = {
            "rows": rows,
            "engine": engine,
            "engine_classes": sorted({type(lookup.engine).__name__ for lookup in lookups}),
            "attach_seconds": seconds,
            "bytes": sum(lookup.nbytes for lookup in lookups),
            "index_bytes": sum(lookup.engine.nbytes for lookup in lookups),
        }
        print(f"attached {name} in {seconds:.0f} s", flush=True)
    return found


def measure(model: nn.Module, texts: Texts, options) -> dict[str, dict]:
    """All memories in turns with the base, then their lookups in turns and each one's recall; by name."""
    memories = attach_memories(model, texts, options)
    try:
        sides = [BASE, *memories]
        timings = {"decode": decoding(model, sides, texts.prompt, texts.decoded, options.rounds)}
        for length, text in texts.prefilled.items():
            timings[f"prefill {length}"] = prefilling(model, sides, text, options.rounds)
        lookups = lookups_in_turns(model, list(memories), texts.prompt, texts.decoded, options.rounds)
        for name, found in memories.items():
            found["forwards"] = {kind: forward(rounds[BASE], rounds[name]) for kind, rounds in timings.items()}
            found["lookups"] = {
                kind: lookup([one[kind] for one in lookups[name]], [one[kind] for one in lookups[sides[1]]])
                for kind in ("decode", "prefill")
            }
            found["quality"] = quality(model, name, texts.queries)
    finally:
        detach_memory(model)
    return memories


def forward(base: list[list[float]], memory: list[list[float]]) -> dict:
    """Medians in milliseconds, their paired ratio, and all timings."""
    flat = ([value for one in rounds for value in one] for rounds in (base, memory))
    medians = {name: 1e3 * median(values) for name, values in zip(("base_ms", "memory_ms"), flat)}
    return medians | {"ratio": ratio(base, memory), "seconds": {"base": base, "memory": memory}}


def lookup(rounds: list[dict[str, float]], first: list[dict[str, float]]) -> dict:
    """Median microseconds by step, and the ratio to the first memory's lookups, which took turns with these."""
    steps = {step: median([one[step] for one in rounds]) for step in rounds[0]}
    against = ratio(*([[one["whole"]] for one in side] for side in (first, rounds)))
    return {"microseconds": steps, "against_first": against}


def run(options, argv: list[str] | None) -> None:
    """Measures, prints and writes the page."""
    device = torch.device(options.device)
    config = copy.deepcopy(PUBLISHED.get(options.model)) or AutoConfig.from_pretrained(options.model)
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    model = random_model(config, device, DTYPES[options.dtype])
    texts = Texts.draw(config.vocab_size, options, device)
    content = {
        "made": provenance(MODULE, argv, device),
        "model": {
            "name": options.model,
            "layers": config.num_hidden_layers,
            "dtype": options.dtype,
            "bytes": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
            "experts": model.config._experts_implementation,
            "attention": model.config._attn_implementation,
        },
        "rounds": options.rounds,
        "prompt_tokens": options.length,
        "memories": measure(model, texts, options),
    }
    page = report(content)
    write(options.results, "overhead" if device.type == "cpu" else "overhead-cuda", content, page)
    print(page)


def report(content: dict) -> str:
    """The page."""
    model, memories = content["model"], content["memories"]
    method = (
        f"{model['name']}, {model['layers']} layers, random {model['dtype']} weights of {model['bytes'] / 1e9:.2f} "
        f"GB, experts {model['experts']}, attention {model['attention']}. Times are medians; ratios are medians of "
        f"paired timings, with 95 % intervals of a bootstrap over {content['rounds']} rounds in which base and "
        "memories took turns. *Lookups* are timed one by one inside the model, and given as a share of the base's "
        "time. The output head is in no timing."
    )
    parts = [shown_provenance(content["made"]), method]
    parts += ["## Time of a forward", _forwards(memories, model["layers"], content["prompt_tokens"])]
    parts += ["## Recall and size", _sizes(memories, model)]
    parts += ["## One layer's lookup, microseconds, and its steps", _lookups(memories, content["prompt_tokens"])]
    return "\n\n".join(parts)


def _forwards(memories: dict[str, dict], layers: int, prompt_tokens: int) -> str:
    lookups, lines = {"decode": "decode", f"prefill {prompt_tokens}": "prefill"}, []
    for kind in next(iter(memories.values()))["forwards"]:
        for name, found in memories.items():
            one, share = found["forwards"][kind], ""
            if kind in lookups:
                spent = layers * found["lookups"][lookups[kind]]["microseconds"]["whole"] / 1e3
                share = f"{spent:.2f} ms, {100 * spent / one['base_ms']:.2f} %"
            times = [f"{one['base_ms']:.1f}", f"{one['memory_ms']:.1f}"]
            lines.append([kind, name, *times, Ratio(*one["ratio"]).as_overhead, share])
    return table(["", "memory", "base, ms", "with memory, ms", "ratio", "lookups, and of the base"], lines)


def _sizes(memories: dict[str, dict], model: dict) -> str:
    header = ["memory", "engine", "recall at 16: mean, worst layer", "bytes a row", "of them index", "of the model"]
    header += ["attach, s", "distance of the nearest, the 16th", "confidence"]
    lines = []
    for name, found in memories.items():
        recalls, rows = found["quality"]["recall"], found["rows"] * model["layers"]
        cells = [name, ", ".join(found["engine_classes"]), f"{sum(recalls) / len(recalls):.4f}, {min(recalls):.4f}"]
        cells += [f"{found['bytes'] / rows:.1f}", f"{found['index_bytes'] / rows:.1f}"]
        cells += [f"{100 * found['bytes'] / model['bytes']:.2f} %", f"{found['attach_seconds']:.1f}"]
        cells.append(", ".join(f"{median(found['quality'][place]):.3f}" for place in ("nearest", "last")))
        lines.append([*cells, f"{found['quality']['confidence']:.2f}"])
    return table(header, lines)


def _lookups(memories: dict[str, dict], prompt_tokens: int) -> str:
    lines = []
    for kind, tokens in (("decode", 1), ("prefill", prompt_tokens)):
        for name, found in memories.items():
            spent, against = found["lookups"][kind]["microseconds"], found["lookups"][kind]["against_first"]
            cells = [f"{spent[step]:.0f}" if step in spent else "" for step in ("whole", *STEPS)]
            lines.append([name, str(tokens), *cells, str(Ratio(*against))])
    return table(["memory", "tokens at once", "whole", *STEPS, "against the first memory"], lines)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--rows", type=int, nargs="+", default=[10_000, 100_000, 200_000, 1_000_000], help="in each layer")
    add("--engines", nargs="+", choices=SEARCH_BACKENDS, default=[KNNMoEConfig().search_backend])
    add("--model", default="allenai/OLMoE-1B-7B-0924", help=f"a folder, or one of {', '.join(PUBLISHED)}")
    add("--layers", type=int, help="layers of the model, each with a memory; default: the published number")
    add("--device", default="cpu", help="cpu or cuda")
    add("--rounds", type=int, default=10, help="turns of base and memories; default 10")
    add("--steps", type=int, default=8, help="decoding steps in a round; default 8")
    add("--prefill", type=int, nargs="+", default=[256], help="tokens; default 256")
    add("--length", type=int, default=256, help="tokens of the prompt and of a stored window; default 256")
    add("--references", type=int, default=4096, help="tokens whose router inputs rows lie around; default 4096")
    add_dtype(options)
    options = options.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    run(options, argv)


if __name__ == "__main__":
    main()
