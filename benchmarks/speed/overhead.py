"""What memories cost a full-size model: decode and prefill against the frozen model, bytes, recall.

    python -m benchmarks.speed.overhead --rows 200000 --layers 4 --rounds 7
    python -m benchmarks.speed.overhead --rows 10000 100000 1000000 --layers 4      # growth with the rows
    python -m benchmarks.speed.overhead --rows 200000 --engines auto faiss torch    # engines inside the model
    python -m benchmarks.speed.overhead --rows 200000 --layers 4 --recalls routing next_tokens both

The model has the published sizes and random weights, the memories rows around the router inputs of random text
(`benchmarks/speed/synthetic.py` says how). Base and all memories are attached to one model and take turns on the same
tokens, so that ratios are of neighbours in time. Every option of a memory but the engine and the recall is the
default.

With `--layers`, the model has fewer layers than the published one, each with a memory. The output head is left out of
every timing, so that the ratio is the same for 4 layers as for 16 (a little more than with the head). With other
recalls than `routing` it is in every timing, as they act there: prefills are timed with the logits of all tokens and
with those of the last one alone. Such a recall acts once in a forward, so that its share grows as layers are left out.
"""

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from benchmarks.pages import DTYPES, add_dtype, parser, provenance, shown_provenance, table, write
from benchmarks.speed.in_model import BASE, STEPS, decoding, lookups_in_turns, lookups_of, prefilling, quality
from benchmarks.speed.measuring import Ratio, added, median, ratio, timed
from benchmarks.speed.synthetic import first_rows, memory_of, random_model, random_text, synthetic_layers
from knnmoe_hf import KNNMoEConfig, attach_memory, detach_memory
from knnmoe_hf.lookup.options import RECALLS, SEARCH_BACKENDS
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
    """Attaches one memory for each number of rows, engine and recall; what is known of each, by name."""
    layers, found = synthetic_layers(model, texts.stored, max(options.rows), KNNMoEConfig()), {}
    vocabulary, generator = model.get_output_embeddings().weight.shape[0], torch.Generator().manual_seed(0)
    next_tokens = torch.randint(vocabulary, (max(options.rows),), generator=generator)
    for rows, engine, recall in itertools.product(options.rows, options.engines, options.recalls):
        config = KNNMoEConfig(search_backend=engine, recall=recall)
        name = f"{rows:,} rows, {engine}" + f", {recall}" * (options.recalls != [RECALLS[0]])
        fewer = {layer: first_rows(table, rows, config) for layer, table in layers.items()}
        memory = memory_of(fewer, find_gates(model), config, next_tokens[:rows])
        seconds = timed(lambda: attach_memory(model, memory, name), model.device)  # noqa: B023
        lookups = lookups_of(model, name).values()
        found[name] = {
            "rows": rows,
            "engine": engine,
            "recall": recall,
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
    with_head = options.recalls != [RECALLS[0]]
    prefills = {", all logits": 0, ", last logits": 1} if with_head else {"": None}
    try:
        sides = [BASE, *memories]
        keep = 1 if with_head else None
        timings = {"decode": decoding(model, sides, texts.prompt, texts.decoded, options.rounds, keep)}
        for (length, text), (which, keep) in itertools.product(texts.prefilled.items(), prefills.items()):
            timings[f"prefill {length}{which}"] = prefilling(model, sides, text, options.rounds, keep)
        routing = [name for name, found in memories.items() if found["recall"] == RECALLS[0]]
        lookups = lookups_in_turns(model, routing, texts.prompt, texts.decoded, options.rounds)
        for name, found in memories.items():
            found["forwards"] = {kind: forward(rounds[BASE], rounds[name]) for kind, rounds in timings.items()}
            found["quality"] = quality(model, name, texts.queries)
            alone = next((one for one in routing if name.startswith(one.removesuffix(RECALLS[0]))), None)
            if name in lookups:
                found["lookups"] = {
                    kind: lookup([one[kind] for one in lookups[name]], [one[kind] for one in lookups[routing[0]]])
                    for kind in ("decode", "prefill")
                }
            elif alone is not None:
                found["added"] = {kind: added(one[BASE], one[alone], one[name]) for kind, one in timings.items()}
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
            "vocabulary": config.vocab_size,
            "bytes": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
            "experts": model.config._experts_implementation,
            "attention": model.config._attn_implementation,
        },
        "rounds": options.rounds,
        "prompt_tokens": options.length,
        "memories": measure(model, texts, options),
    }
    page = report(content)
    name = "overhead" + "-recalls" * (options.recalls != [RECALLS[0]]) + "-cuda" * (device.type == "cuda")
    write(options.results, name, content, page)
    print(page)


def report(content: dict) -> str:
    """The page."""
    model, memories = content["model"], content["memories"]
    with_recalls = any("added" in found for found in memories.values())
    method = (
        f"{model['name']}, {model['layers']} layers, random {model['dtype']} weights of {model['bytes'] / 1e9:.2f} "
        f"GB, experts {model['experts']}, attention {model['attention']}. Times are medians; ratios are medians of "
        f"paired timings, with 95 % intervals of a bootstrap over {content['rounds']} rounds in which base and "
        "memories took turns. *Lookups* are timed one by one inside the model, and given as a share of the base's "
        f"time. The output head, {model['vocabulary']} tokens wide, is in {'every' if with_recalls else 'no'} timing."
    )
    parts = [shown_provenance(content["made"]), method]
    parts += ["## Time of a forward", _forwards(memories, model["layers"], content["prompt_tokens"])]
    if with_recalls:
        parts += ["## Next tokens beside routing alone, in points of the base's time", _added(memories)]
    parts += ["## Recall and size", _sizes(memories, model)]
    parts += ["## One layer's lookup, microseconds, and its steps", _lookups(memories, content["prompt_tokens"])]
    return "\n\n".join(parts)


def _forwards(memories: dict[str, dict], layers: int, prompt_tokens: int) -> str:
    lookups, lines = {"decode": "decode"}, []
    lookups |= {f"prefill {prompt_tokens}{which}": "prefill" for which in ("", ", last logits")}
    for kind in next(iter(memories.values()))["forwards"]:
        for name, found in memories.items():
            one, share = found["forwards"][kind], ""
            if kind in lookups and "lookups" in found:
                spent = layers * found["lookups"][lookups[kind]]["microseconds"]["whole"] / 1e3
                share = f"{spent:.2f} ms, {100 * spent / one['base_ms']:.2f} %"
            times = [f"{one['base_ms']:.1f}", f"{one['memory_ms']:.1f}"]
            lines.append([kind, name, *times, Ratio(*one["ratio"]).as_overhead, share])
    return table(["", "memory", "base, ms", "with memory, ms", "ratio", "lookups, and of the base"], lines)


def _added(memories: dict[str, dict]) -> str:
    rows = {name: found["added"] for name, found in memories.items() if "added" in found}
    kinds = list(next(iter(rows.values())))
    lines = ([name, *(Ratio(*found[kind]).as_points for kind in kinds)] for name, found in rows.items())
    return table(["memory", *kinds], lines)


def _sizes(memories: dict[str, dict], model: dict) -> str:
    header = ["memory", "engine", "recall: mean, worst layer", "bytes a row", "of them index", "of the model"]
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
            if "lookups" not in found:
                continue
            spent, against = found["lookups"][kind]["microseconds"], found["lookups"][kind]["against_first"]
            cells = [f"{spent[step]:.0f}" if step in spent else "" for step in ("whole", *STEPS)]
            lines.append([name, str(tokens), *cells, str(Ratio(*against))])
    return table(["memory", "tokens at once", "whole", *STEPS, "against the first memory"], lines)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--rows", type=int, nargs="+", default=[10_000, 100_000, 200_000, 1_000_000], help="in each layer")
    add("--engines", nargs="+", choices=SEARCH_BACKENDS, default=[KNNMoEConfig().search_backend])
    add("--recalls", nargs="+", choices=RECALLS, default=[RECALLS[0]], help="what memories change; default routing")
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
