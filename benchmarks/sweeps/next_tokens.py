"""How the neighbours' tokens should vote: every way that was tried, at equal harm.

    python -m benchmarks.sweeps.next_tokens                                   # three labs, domain topics
    python -m benchmarks.sweeps.next_tokens --labs olmoe --kinds headers

One memory for each lab and domain with the library's defaults. What it finds for each token of validation text is
observed once, with the model's own routing and with the memory's; then every way of mixing is evaluated on these
observations, exactly as `recall="next_tokens"` and `"both"` would mix. Each way has one strength m, and is shown at
the m that gains most while the mean harm of the other kinds of text stays within a bound and that of each kind within
another, so that ways are compared at equal harm. That m was chosen on the same text: figures compare ways, they are
not what a user gets (effect.md has that).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.effect.memories import Memories
from benchmarks.effect.settings import DEFAULT, LABS, Setting
from benchmarks.pages import DTYPES, add_dtype, parser, provenance, table, write
from benchmarks.sweeps.confidence import read
from benchmarks.sweeps.voting import RULES, Seen, Votes
from benchmarks.texts import IN_DOMAIN, REFERENCES, LabTexts
from knnmoe_hf import RoutingMemory, attach_memory, detach_memory, watch_lookups
from knnmoe_hf.lab import LAB_MODELS

MODULE = "benchmarks.sweeps.next_tokens"
MEAN_HARM, WORST_HARM = 0.002, 0.006
_NEIGHBORS, _TEMPERATURES, _MOST = (16, 32, 64, 128, 256), (0.1, 0.25, 0.5, 1.0), 256
_USUAL = (64, 0.25)  # neighbours, temperature: of the ways that do not name theirs
_CHOSEN, _KEY_DIMS = ("constant weight", "agreement and nearness"), (24, 96, 192)
RECALLED = ("next_tokens", "both")
_STRENGTHS = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)


@torch.no_grad()
def observe(model: nn.Module, memory: RoutingMemory, recall: str, windows: Tensor) -> Seen:
    """Of all tokens of (B, S) windows but each one's last; with weight 0, which leaves the model's distribution."""
    config = type(memory.config).from_dict(
        memory.config.saved() | {"recall": recall, "next_token_weight": 0.0, "next_token_neighbors": _MOST}
    )
    attach_memory(model, replace(memory, config=config))
    next_tokens, (before, last) = memory.next_tokens.long(), list(memory.layers)[-2:]
    parts, events = [], {}
    try:
        with watch_lookups(model, lambda event: events.update({event.layer: event})):
            for batch in windows.split(8):
                logits = model(batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
                kept = torch.ones_like(batch, dtype=torch.bool)
                kept[:, -1] = False
                kept = kept.flatten()
                target = batch[:, 1:].flatten()
                found = []
                for layer, some in ((last, events[last].voters), (before, events[before].neighbors)):
                    found += [some.distances[kept] / memory.layers[layer].scale, next_tokens[some.rows[kept]]]
                logits = logits.flatten(0, 1)
                own = logits.gather(1, target[:, None])[:, 0]
                of_model = own, logits.amax(-1).exp(), -(logits.exp() * logits).sum(-1)
                parts.append((target, *of_model, events[last].confidence.float()[kept], *found))
    finally:
        detach_memory(model)
    *rest, distances, tokens = (torch.cat(some) for some in zip(*parts))
    return Seen(*rest, (distances, tokens))


def at_equal_harm(texts: dict[str, tuple[Seen, Tensor, Callable]], base: dict[str, Tensor]) -> dict[str, float]:
    """
    The change in-domain, the mean and the worst off-domain, and m, where the gain is largest within the bounds.

    Args:
        texts: by kind, `"in"` first, what was seen, the recalled mass of the target (n,) and the weights by m.
        base: (n,) log-probability of the target by the frozen model, by kind.
    """
    best = {"in": 0.0, "off": 0.0, "worst": 0.0, "m": 0.0}
    for m in _STRENGTHS.tolist():
        change = {}
        for kind, (seen, recalled, weight) in texts.items():
            w = weight(m).clamp(0, 0.999)
            mixed = ((1 - w) * seen.own.exp() + w * recalled).clamp_min(1e-12).log()
            change[kind] = (base[kind] - mixed).mean().item()
        gain, *harms = change.values()
        off, worst = sum(harms) / len(harms), max(harms)
        if off <= MEAN_HARM and worst <= WORST_HARM and gain < best["in"]:
            best = {"in": gain, "off": off, "worst": worst, "m": m}
    return best


def evaluate(
    seen: dict[str, Seen], base: dict[str, Tensor], names: Sequence[str], neighbors: int, temperature: float, share=0.0
) -> dict[str, dict[str, float]]:
    """Some of the `RULES` at one number of neighbours, one temperature and one share of the layer before."""
    found, votes = {}, {}
    for kind, one in seen.items():
        own = Votes.of(one.distances, one.tokens, one.target, neighbors, temperature)
        before = Votes.of(*one.before, one.target, neighbors, temperature)
        votes[kind] = replace(own, target=(1 - share) * own.target + share * before.target)
    for name in names:
        mixing, strength = RULES[name]
        trust = {kind: strength(seen[kind], votes[kind]) for kind in seen}
        texts = {kind: (seen[kind], votes[kind].target, partial(mixing, trust[kind])) for kind in seen}
        found[name] = at_equal_harm(texts, base)
    return found


def ways(seen: dict[str, Seen], base: dict[str, Tensor], others: dict[str, dict[str, Seen]]) -> dict[str, dict]:
    """Every way by name; `others` are what memories with other keys saw."""
    neighbors, temperature = _USUAL
    rows = evaluate(seen, base, list(RULES), neighbors, temperature)
    for count in _NEIGHBORS:
        found = evaluate(seen, base, _CHOSEN, count, temperature)
        rows |= {f"{name}, {count} neighbours": one for name, one in found.items()}
    for other in _TEMPERATURES:
        found = evaluate(seen, base, _CHOSEN, neighbors, other)
        rows |= {f"{name}, temperature {other:g}": one for name, one in found.items()}
    for share in (0.25, 0.5):
        found = evaluate(seen, base, _CHOSEN[1:], neighbors, temperature, share)
        rows |= {f"{name}, the layer before has {share:g} of the votes": one for name, one in found.items()}
    for keys, other in others.items():
        changed = {kind: replace(seen[kind], distances=o.distances, tokens=o.tokens) for kind, o in other.items()}
        found = evaluate(changed, base, _CHOSEN[1:], neighbors, temperature)
        rows |= {f"{name}, {keys}": one for name, one in found.items()}
    return rows


def sweep(lab: str, kind: str, options) -> dict[str, dict[str, dict[str, float]]]:
    """Every way on one lab and domain, by what else the memory changes and by name."""
    model = AutoModelForCausalLM.from_pretrained(LAB_MODELS[lab], dtype=DTYPES[options.dtype]).eval()
    tokenizer = AutoTokenizer.from_pretrained(LAB_MODELS[lab])
    texts, results, base = LabTexts(tokenizer), {}, {}
    windows = {name: some for name, some in read(kind, texts, options.windows).items() if "then" not in name}
    memories = Memories(model, tokenizer, texts.references(kind, 0, options.references), 0)

    def observed(setting: Setting, recall: str) -> dict[str, Seen]:
        memory = memories.of(setting).memory
        return {name: observe(model, memory, recall, some) for name, some in windows.items()}

    for recall in RECALLED:
        seen = observed(DEFAULT, recall)
        base = base or {name: one.own for name, one in seen.items()}  # of the frozen model, in the first round
        keys = {f"keys of {dim} axes": replace(DEFAULT, config={"key_dim": dim}) for dim in _KEY_DIMS}
        others = {name: observed(setting, recall) for name, setting in keys.items() if recall == "next_tokens"}
        results[recall] = ways(seen, base, others)
        print(lab, kind, recall, flush=True)
    return results


def report(results: dict[str, dict]) -> str:
    """The page: a table for each recall, with a column for each lab and domain."""
    parts = [
        "# How the neighbours' tokens should vote",
        "Written by `python -m benchmarks.sweeps.next_tokens`. Change of the NLL in-domain, in nats per token against "
        f"the frozen model, on validation text, where the mean harm of the four other kinds is at most {MEAN_HARM} "
        f"and that of each at most {WORST_HARM}; in brackets the strength m. {_USUAL[0]} neighbours, temperature "
        f"{_USUAL[1]}, unless the row says otherwise. H is the entropy of the recalled "
        "distribution, d_1 the distance of the nearest neighbour in units of the layer's scale. 0 means that no m "
        "keeps within the bounds. m was chosen on this text: figures compare the ways with each other alone.",
        "The library's default is *agreement and nearness*; with a `next_token_weight` that is given, *constant "
        "weight*. *Without a confidence* is kNN-LM as published.",
    ]
    for recall in RECALLED:
        names = list(dict.fromkeys(name for found in results.values() for name in found[recall]))
        lines = []
        for name in names:
            cells = [found[recall].get(name) for found in results.values()]
            lines.append([name, *(f"{one['in']:+.4f} ({one['m']:.2f})" if one else "" for one in cells)])
        parts += [f'## `recall="{recall}"`', table(["", *results], lines)]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--labs", nargs="+", default=list(LABS), choices=list(LAB_MODELS))
    add("--kinds", nargs="+", default=["topics"], choices=IN_DOMAIN)
    add("--windows", type=int, default=16, help="validation windows of each kind; default 16")
    add("--references", type=int, default=REFERENCES, help=f"windows of reference text; default {REFERENCES}")
    add_dtype(options)
    options = options.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    path, made = options.results / "next_tokens.json", provenance(MODULE, argv)
    results = json.loads(path.read_text()) if path.exists() else {}
    for lab in options.labs:
        for kind in options.kinds:
            results[f"{lab}, {kind} (commit {made['commit']})"] = sweep(lab, kind, options)
            write(options.results, "next_tokens", results, report(results))


if __name__ == "__main__":
    main()
