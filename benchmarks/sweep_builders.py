"""Which builder, and with what constants: the sweep that the defaults of `KNNMoETrainingArguments` come from.

    python benchmarks/sweep_builders.py                                       # the shipped lab model, every trial
    python benchmarks/sweep_builders.py --model model_cards/lab-qwen3-moe --kinds topics headers --only defaults

A trial builds a memory from reference text and is judged on the tail of the same split, which no memory holds, and on
text that the model was trained on, where a memory should do nothing. The `test` splits are for reporting and are not
read. One factor at a time is changed. `benchmarks/results/builders.json` and `.md` keep the rows of earlier runs.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it knows only its own folder

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.estimators import MidPoint, StraightThrough
from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, KNNMoETrainingArguments, detach_memory
from knnmoe_hf.evaluation import Scores, paired_bootstrap, score
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents, windows
from knnmoe_hf.training.builders.random_search import Search
from knnmoe_hf.training.data import prepare_dataset

RESULTS = Path(__file__).parent / "results"
OFF_DOMAIN = ("python", "train")
ESTIMATORS = {"straight-through": StraightThrough, "mid-point": MidPoint}
AS_FOUND = {"confidence": "rbf", "key_codec": "raw", "key_dtype": "float32", "value_dtype": "float32"}
"""Memories that show what a builder found: nothing else is fitted and nothing rounded."""
GRID = {  # the first of each, and one factor changed at a time
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
    "straight-through": [{}, *({"learning_rate": rate} for rate in (0.1, 0.5))],
    "mid-point": [{}, *({"learning_rate": rate} for rate in (0.1, 0.5))],
}
CANDIDATE_STEPS = {"straight-through": 0, "mid-point": 5}  # the former has its candidates open in every step
OF_SEARCH = ("noise", "draws")  # no arguments of a build


@dataclass(frozen=True)
class Trial:
    """A builder of the library or one of `ESTIMATORS`, and what is not as by default."""

    builder: str
    changed: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return ", ".join([self.builder, *(f"{name} {value}" for name, value in self.changed.items())])


def trials(only: str) -> Iterator[Trial]:
    """Those of `GRID`, all or of one builder; or the library's builders as they are, and what comes next to them."""
    if only == "defaults":
        yield from (Trial("candidates", {"candidate_steps": 2}), Trial("candidates"), Trial("topk"), Trial("search"))
    for builder, changes in GRID.items():
        if only in ("all", builder):
            yield from (Trial(builder, changed) for changed in changes)


class SweptTrainer(KNNMoETrainer):
    """Builds with what is no builder of the library, or has another constant, if the trial asks for it."""

    def __init__(self, trial: Trial, **kwargs):
        self.trial = trial
        super().__init__(**kwargs)

    def make_builder(self):
        args, builder, changed = self.args, self.trial.builder, self.trial.changed
        common = dict(model=self.model, gates=self.gates, steps=args.builder_steps)
        if own := {name: changed[name] for name in OF_SEARCH if name in changed}:
            return Search(**common, seed=args.seed, **own)
        if builder not in ESTIMATORS:
            return super().make_builder()
        return ESTIMATORS[builder](
            **common,
            candidates=None,
            candidate_steps=CANDIDATE_STEPS[builder],
            learning_rate=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )


class Texts:
    """Reference windows (drawn by seed), the tail of the same text to validate on, and off-domain windows."""

    def __init__(self, kind: str, tokenizer, tokens: int, held_out: int, length: int = 256):
        cut = windows(documents(kind, "reference"), tokenizer, length)
        off = windows(documents(*OFF_DOMAIN), tokenizer, length, limit=40 * held_out)
        self.pool, self.count = cut[:-held_out], tokens // length
        if len(self.pool) < self.count:
            raise ValueError(f"{kind} has {len(self.pool)} windows beside the held-out ones: use fewer --tokens.")
        self.validation, self.off = _rows(cut[-held_out:]), _rows(off[:: len(off) // held_out][:held_out])

    def references(self, seed: int) -> list[dict]:
        """`tokens` of the windows before the tail."""
        drawn = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed))[: self.count]
        return _rows([self.pool[i] for i in drawn.sort().values.tolist()])


def _rows(cut: list[list[int]]) -> list[dict]:
    return prepare_dataset([{"input_ids": ids, "labels": ids} for ids in cut], None, None)


def arguments(trial: Trial, model, folder: str, seed: int) -> KNNMoETrainingArguments:
    """Those of the build."""
    changed = {name: value for name, value in trial.changed.items() if name not in OF_SEARCH}
    if "times_top_k" in changed:
        changed["num_candidates"] = round(changed.pop("times_top_k") * model.config.num_experts_per_tok)
    if trial.builder not in ESTIMATORS:
        changed["builder"] = trial.builder
    quiet = dict(report_to="none", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False)
    return KNNMoETrainingArguments(output_dir=folder, seed=seed, **quiet, **changed)


def run(trial: Trial, model, references: list[dict], texts: Texts, seed: int) -> tuple[dict, tuple[Scores, Scores]]:
    """Builds and scores: what the build came to; the scores of the validation and of the off-domain windows."""
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = SweptTrainer(
            trial,
            model=model,
            args=arguments(trial, model, folder, seed),
            train_dataset=references,
            config=KNNMoEConfig(**AS_FOUND),
        )
        started = time.perf_counter()
        metrics = trainer.train().metrics
        seconds = time.perf_counter() - started
    kept = {name: metrics[name] for name in ("nll_before", "nll_after", "experts_changed", "tokens_worse", "rows")}
    scores = score(model, texts.validation), score(model, texts.off)
    detach_memory(model)
    return kept | {"seconds": seconds}, scores


def sweep(options: argparse.Namespace) -> Iterator[dict]:
    """One record for each kind of text, seed and trial."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    for kind in options.kinds:
        texts = Texts(kind, tokenizer, options.tokens, options.held_out)
        base = score(model, texts.validation), score(model, texts.off)
        for seed in options.seeds:
            references, first = texts.references(seed), None
            for trial in trials(options.only):
                found, scores = run(trial, model, references, texts, seed)
                first = scores[0] if first is None else first
                changes = {
                    "in": paired_bootstrap(base[0], scores[0]),
                    "off": paired_bootstrap(base[1], scores[1]),
                    "against_first": paired_bootstrap(first, scores[0]),
                }
                yield {
                    "model": model.config.model_type,
                    "kind": kind,
                    "seed": seed,
                    "trial": trial.name,
                    "tokens": options.tokens,
                    "held_out": options.held_out,
                    **found,
                    **{name: [change.mean, change.low, change.high] for name, change in changes.items()},
                }


GROUP = ("model", "kind", "seed", "tokens")
COLUMNS = (
    "trial | reference NLL | tokens worse, % | sets changed, % | in-domain NLL | against the first | off-domain NLL "
    "| build, ms per token"
)


def report(records: list[dict]) -> str:
    """The records as Markdown tables, one for each of `GROUP`."""
    lines = [
        "Written by `benchmarks/sweep_builders.py`. Change of the NLL in nats per token against the frozen model, a",
        "paired-bootstrap 95 % interval by window, on text that the memory does not hold (validation, never test).",
    ]
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in GROUP), []).append(record)
    for (model, kind, seed, tokens), rows in groups.items():
        sizes = f"{tokens} reference tokens, {rows[0]['held_out']} windows of each text"
        head = f"| {COLUMNS} |"
        lines += ["", f"## {model}, {kind}, seed {seed} ({sizes})", "", head, "|---" * (head.count("|") - 1) + "|"]
        lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def _line(row: dict) -> str:
    cells = [
        row["trial"],
        f"{row['nll_before']:.3f} -> {row['nll_after']:.3f}",
        f"{100 * row['tokens_worse']:.1f}",
        f"{100 * row['experts_changed']:.0f}",
        *("{:+.4f} [{:+.4f}, {:+.4f}]".format(*row[name]) for name in ("in", "against_first", "off")),
        f"{1000 * row['seconds'] / row['rows']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def save(record: dict, folder: Path) -> None:
    """Adds a record to the files, in the place of an older one of the same trial."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "builders.json"
    known = json.loads(path.read_text()) if path.exists() else []
    known = [row for row in known if any(row[name] != record[name] for name in (*GROUP, "trial"))] + [record]
    path.write_text(json.dumps(known, indent=1) + "\n")
    path.with_suffix(".md").write_text(report(known))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(LAB_MODELS["olmoe"]), help="a folder or a repository of the Hub")
    parser.add_argument("--kinds", nargs="+", default=["topics"], help="kinds of lab text with a reference split")
    parser.add_argument("--tokens", type=int, default=16384, help="reference tokens; default 16384")
    parser.add_argument("--held-out", type=int, default=24, help="windows of 256 tokens of each text; default 24")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="draw the references, and search's noise")
    parser.add_argument("--only", choices=["all", "defaults", *GRID], default="all", help="which trials; default all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of builders.json and builders.md")
    options = parser.parse_args(argv)
    for record in sweep(options):
        save(record, options.results)
        print(record["kind"], _line(record), flush=True)


if __name__ == "__main__":
    main()
