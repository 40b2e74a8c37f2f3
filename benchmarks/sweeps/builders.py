"""Which builder, and with which constants: the sweep that the defaults of `KNNMoETrainingArguments` come from.

    python -m benchmarks.sweeps.builders                                            # the lab's OLMoE, every trial
    python -m benchmarks.sweeps.builders --model model_cards/lab-qwen3-moe --kinds topics headers --only defaults

A trial builds a memory from reference text, and is judged on validation text of the same kind, which no memory holds,
and on text that the model was trained on, where a memory should change nothing. Test text is not read. Trials change
one constant at a time. `builders.json` and `builders.md` keep the rows of earlier runs, in tables by commit.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.builds import RAW, training_arguments
from benchmarks.pages import DTYPES, add_dtype, nats, parser, provenance, table, write
from benchmarks.texts import WINDOW, LabTexts
from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, detach_memory
from knnmoe_hf.evaluation import Change, Scores, paired_bootstrap, score
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.training.builders.random_search import RandomSearch

MODULE, OFF_DOMAIN = "benchmarks.sweeps.builders", "python"
GRID = {  # for each builder, its defaults, then one constant changed
    "candidates": [
        {},
        *({"builder_steps": steps} for steps in (5, 20)),
        *({"learning_rate": rate} for rate in (0.1, 0.5, 1.0)),
        *({"times_top_k": times} for times in (1.5, 3)),
        *({"candidate_steps": steps} for steps in (2, 3, 7)),
    ],
    "topk": [
        {},
        *({"builder_steps": steps} for steps in (5, 20)),
        *({"learning_rate": rate} for rate in (0.1, 0.5, 1.0)),
    ],
    "search": [
        {},
        *({"builder_steps": steps} for steps in (10, 40)),
        *({"noise": noise} for noise in (0.15, 0.6)),
        *({"draws": draws} for draws in (1, 6)),
    ],
}
OF_SEARCH = ("noise", "draws")  # constants of the builder that are no arguments of a build


@dataclass(frozen=True)
class Trial:
    """A builder, and what differs from its defaults."""

    builder: str
    changed: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`"candidates, builder_steps 5"`."""
        return ", ".join([self.builder, *(f"{name} {value}" for name, value in self.changed.items())])


def trials(only: str) -> Iterator[Trial]:
    """All of `GRID`, those of one builder, or every builder's defaults."""
    for builder, changes in GRID.items():
        if only in ("all", "defaults", builder):
            yield from (Trial(builder, changed) for changed in (changes[:1] if only == "defaults" else changes))


class SweptTrainer(KNNMoETrainer):
    """Builds with the constants of a trial, also with those that are no arguments of a build."""

    def __init__(self, trial: Trial, *args, **kwargs):
        self.search_constants = {name: trial.changed[name] for name in OF_SEARCH if name in trial.changed}
        super().__init__(*args, **kwargs)

    def make_builder(self):
        """See `KNNMoETrainer.make_builder`."""
        if not self.search_constants:
            return super().make_builder()
        return RandomSearch(self.model, self.gates, self.args.builder_steps, self.args.seed, **self.search_constants)


def build_arguments(trial: Trial, top_k: int) -> dict:
    """A trial's arguments of a build, for a model that routes each token to `top_k` experts."""
    changed = {name: value for name, value in trial.changed.items() if name not in OF_SEARCH}
    if "times_top_k" in changed:
        changed["num_candidates"] = round(changed.pop("times_top_k") * top_k)
    return changed | {"builder": trial.builder}


def run(trial: Trial, model, references: list[dict], texts: dict[str, list[dict]], seed: int) -> tuple[dict, dict]:
    """Builds and scores: the metrics of the build, and the scores by kind of text."""
    set_seed(seed)
    asked = build_arguments(trial, model.config.num_experts_per_tok) | {"seed": seed}
    config = KNNMoEConfig(**RAW, confidence="rbf")  # nothing is rounded or calibrated: what the builder found
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(asked, folder)
        trainer = SweptTrainer(trial, model=model, args=arguments, train_dataset=references, config=config)
        started = time.perf_counter()
        metrics = trainer.train().metrics
        seconds = time.perf_counter() - started
        scores = {name: score(model, rows) for name, rows in texts.items()}
    detach_memory(model)
    kept = {name: metrics[name] for name in ("nll_before", "nll_after", "experts_changed", "tokens_worse", "rows")}
    return kept | {"seconds": seconds}, scores


def sweep(options, made: dict) -> Iterator[dict]:
    """One record for each kind of text, seed and trial."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=DTYPES[options.dtype]).eval()
    reader = LabTexts(AutoTokenizer.from_pretrained(options.model))
    for kind in options.kinds:
        texts = {
            "in": reader.validation(kind, options.held_out),
            "off": reader.trained_on(OFF_DOMAIN, options.held_out),
        }
        base = {name: score(model, rows) for name, rows in texts.items()}
        for seed in options.seeds:
            references, first = reader.references(kind, seed, options.tokens // WINDOW), None
            for trial in trials(options.only):
                found, scores = run(trial, model, references, texts, seed)
                first = first or scores
                record = {"commit": made["commit"], "command": made["command"], "model": model.config.model_type}
                record |= {"kind": kind, "seed": seed, "tokens": len(references) * WINDOW, "trial": trial.name}
                yield record | {"held_out": options.held_out} | found | changes(base, first, scores)


def changes(base: dict[str, Scores], first: dict[str, Scores], scores: dict[str, Scores]) -> dict[str, list[float]]:
    """Of the NLL: in-domain, off-domain, and in-domain against the first trial; mean and interval."""
    found = {name: paired_bootstrap(base[name], scores[name]) for name in ("in", "off")}
    found["against_first"] = paired_bootstrap(first["in"], scores["in"])
    return {name: [change.mean, change.low, change.high] for name, change in found.items()}


GROUP = ("commit", "model", "kind", "seed", "tokens")
HEADER = ["trial", "reference NLL", "tokens worse, %", "sets changed, %", "in-domain NLL", "against the first"]
HEADER += ["off-domain NLL", "build, ms per token"]


def report(records: list[dict]) -> str:
    """The page: a table for each `GROUP`."""
    parts = [
        "Written by `python -m benchmarks.sweeps.builders`. Change of the NLL in nats per token against the frozen "
        "model, with a 95 % interval of a paired bootstrap by window, on text that the memory does not hold "
        "(validation, never test).",
        "Tables of commit 62dcd4e were made by `benchmarks/sweep_builders.py` there; its `solver_steps` is "
        "`builder_steps` now. The gradients straight-through and mid-point did no better than `candidates` and are "
        "not in the library; their code is `benchmarks/estimators.py` at that commit.",
    ]
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in GROUP), []).append(record)
    for (commit, model, kind, seed, tokens), rows in groups.items():
        sizes = f"{tokens} reference tokens, {rows[0]['held_out']} windows of each text, commit {commit}"
        parts.append(f"## {model}, {kind}, seed {seed} ({sizes})")
        parts += [f"`{rows[-1]['command']}`"] if rows[-1].get("command") else []
        parts.append(table(HEADER, map(line, rows)))
    return "\n\n".join(parts)


def line(row: dict) -> list[str]:
    """A record as a row of the table."""
    return [
        row["trial"],
        f"{row['nll_before']:.3f} -> {row['nll_after']:.3f}",
        f"{100 * row['tokens_worse']:.1f}",
        f"{100 * row['experts_changed']:.0f}",
        *(nats(Change(*row[name])) for name in ("in", "against_first", "off")),
        f"{1000 * row['seconds'] / row['rows']:.2f}",
    ]


def merged(known: list[dict], record: dict) -> list[dict]:
    """With a new record, in the place of an older one of the same trial and group."""
    return [row for row in known if any(row[name] != record[name] for name in (*GROUP, "trial"))] + [record]


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--model", default=str(LAB_MODELS["olmoe"]), help="a folder or a repository of the Hub")
    add("--kinds", nargs="+", default=["topics"], help="kinds of lab text with a reference split")
    add("--tokens", type=int, default=16384, help="reference tokens; default 16384")
    add("--held-out", type=int, default=24, help="windows of 256 tokens of each text; default 24")
    add("--seeds", type=int, nargs="+", default=[0], help="draw the references, and the noise of search")
    add("--only", choices=["all", "defaults", *GRID], default="all", help="which trials; default all")
    add_dtype(options)
    options = options.parse_args(argv)
    path = options.results / "builders.json"
    known = json.loads(path.read_text()) if path.exists() else []
    for record in sweep(options, provenance(MODULE, argv)):
        known = merged(known, record)
        write(options.results, "builders", known, report(known))
        print(record["kind"], " | ".join(line(record)), flush=True)


if __name__ == "__main__":
    main()
