"""Every row of the bench, and which rows are measured where. The one file that knows the library's options.

A setting of a memory names only what is not as by default, so the bench follows the defaults.
"""

import functools
from dataclasses import dataclass, field, fields, replace

from transformers import TrainingArguments

from benchmarks.competitors import RATES
from benchmarks.texts import REFERENCES
from knnmoe_hf import KNNMoEConfig, KNNMoETrainingArguments

MEMORIES, COMPETITORS, REFERENCE_COUNTS = "the memory", "competitors", "number of references"
GROUPS = (
    MEMORIES,
    COMPETITORS,
    "builders",
    "value spaces",
    "confidence",
    "keys and values",
    "neighbours",
    "rows",
    "second pass",
    REFERENCE_COUNTS,
)


@dataclass(frozen=True)
class Setting:
    """
    One row.

    Attributes:
        name: unique; also what it is called in tables and plots.
        group: one of `GROUPS`.
        competitor: a key of `benchmarks.competitors.COMPETITORS`, or None for a memory.
        rate: its learning rate; None for its own, or for the best one on validation text.
        config: options of `KNNMoEConfig`.
        build: options of `KNNMoETrainingArguments`.
        optimised: False stores the gate's own logits as values.
        ordinary: kinds of ordinary text for `confidence="calibrated"`; None for all that the library takes by itself.
        references: windows of reference text; fewer if the text has no more.
    """

    name: str
    group: str
    competitor: str | None = None
    rate: float | None = None
    config: dict = field(default_factory=dict)
    build: dict = field(default_factory=dict)
    optimised: bool = True
    ordinary: tuple[str, ...] | None = None
    references: int = REFERENCES

    def options(self) -> dict:
        """All values that decide what is measured, defaults included."""
        if self.competitor is not None:
            rates = RATES.get(self.competitor) if self.rate is None else self.rate
            return {"competitor": self.competitor, "rate": rates, "references": self.references}
        config, arguments = KNNMoEConfig(**self.config).options(), training_arguments(self.build)
        same = {f.name: f.default for f in fields(TrainingArguments)}
        own = {name: getattr(arguments, name) for name in KNNMoETrainingArguments.__annotations__}
        build = {name: value for name, value in own.items() if name not in same} | {
            "learning_rate": own["learning_rate"]
        }
        more = {"optimised": self.optimised, "ordinary": self.ordinary, "references": self.references}
        return {"config": config, "build": build, **more}


def training_arguments(build: dict, folder: str = "unused") -> KNNMoETrainingArguments:
    """Arguments of a build that writes nothing."""
    return KNNMoETrainingArguments(output_dir=folder, report_to="none", disable_tqdm=True, use_cpu=True, **build)


RAW = dict(key_codec="raw", key_dtype="float32", value_dtype="float32", value_experts=None)
_PAPER = RAW | {"confidence": "rbf", "gamma": 0.9}  # the gamma that did best with it on validation text
DEFAULT = Setting("memory, default", MEMORIES)
PAPER = (
    Setting(
        "paper, v1 (assignment)", MEMORIES, config=_PAPER | {"value_space": "assignment"}, build={"builder": "topk"}
    ),
    Setting("paper, v2 (logits)", MEMORIES, config=_PAPER | {"value_space": "logits"}, build={"builder": "topk"}),
)
_TUNED = {name: Setting(name, COMPETITORS, name) for name in ("router-only", "LoRA", "full fine-tuning")}
MAIN = (DEFAULT, *PAPER, *_TUNED.values())
"""Measured for every kind of text and every seed."""


def at_rate(competitor: str, rate: float) -> Setting:
    """A competitor at one of the rates that are tried."""
    return Setting(f"{competitor} at {rate:g}", COMPETITORS, competitor, rate)


def _memory(group: str, name: str, build: dict | None = None, **config) -> Setting:
    return Setting(name, group, config=config, build=build or {})


_VARIANTS = (
    Setting("unoptimised values", COMPETITORS, optimised=False),
    Setting("constant bias", COMPETITORS, "constant bias"),
    *(at_rate(name, rate) for name, rates in RATES.items() for rate in rates),
    *(_memory("builders", f"builder {name}", {"builder": name}) for name in ("topk", "candidates", "search")),
    *(_memory("value spaces", f"values {space}", value_space=space) for space in ("logits", "delta", "assignment")),
    *(_memory("confidence", f"rbf, gamma {g:g}", confidence="rbf", gamma=g) for g in (0.3, 0.9, 2.0)),
    *(_memory("confidence", f"context, {t:g}", confidence="context", context_threshold=t) for t in (0.88, 0.96)),
    _memory("confidence", "calibrated", confidence="calibrated"),
    replace(_memory("confidence", "calibrated on python alone", confidence="calibrated"), ordinary=("python",)),
    _memory("keys and values", "all float32, keys raw", **RAW),
    _memory("keys and values", "keys raw bfloat16", key_codec="raw", key_dtype="bfloat16"),
    *(_memory("keys and values", f"keys pca {d} int8", key_codec="pca", key_dim=d) for d in (96, 48, 24)),
    _memory("keys and values", "keys pca 48 int8, not whitened", key_codec="pca", key_dim=48, key_whitening=0.0),
    _memory("keys and values", "keys logits int8", key_codec="logits", key_dtype="int8"),
    *(_memory("keys and values", f"values of {m} experts", value_experts=m) for m in (8, 16)),
    *(_memory("neighbours", f"{k} neighbours", num_neighbors=k) for k in (8, 32)),
    _memory("rows", "half of the rows", {"max_rows": 128 * REFERENCES}),
    _memory("rows", "a quarter of the rows", {"max_rows": 64 * REFERENCES}),
    _memory("rows", "rows that gained 0.5 nats", {"min_gain": 0.5}),
    _memory("rows", "duplicates merged", {"merge_distance": 0.1}),
    _memory("rows", "2 layers of 4", {"num_layers": 2}),
    _memory("second pass", "keys read again", {"rekey": True}),
)

COUNTS = (16, 64, 256)
"""Windows of reference text, besides `REFERENCES`."""


def _counts() -> tuple[Setting, ...]:
    """The default memory and two competitors on fewer and on more references."""
    found = []
    for count in COUNTS:
        for setting in (DEFAULT, _TUNED["router-only"], _TUNED["LoRA"]):
            found.append(
                Setting(f"{setting.name}, {count} windows", REFERENCE_COUNTS, setting.competitor, references=count)
            )
    return tuple(found)


@functools.cache
def grid() -> tuple[Setting, ...]:
    """Every row; a variant that is as by default is not measured twice."""
    default = DEFAULT.options()
    return (*MAIN, *(setting for setting in _VARIANTS if setting.options() != default), *_counts())


GRID_KINDS, SEEDS = ("topics",), (0, 1)
"""The whole grid runs on this kind with the first seed, all else has the rows of `MAIN` alone."""
SEEDS_OF = {"topics": SEEDS, "headers": SEEDS[:1], "notices": SEEDS[:1]}


def planned(kind: str, seed: int) -> tuple[Setting, ...]:
    """What is measured with references of a kind drawn by a seed."""
    return grid() if kind in GRID_KINDS and seed == SEEDS[0] else MAIN
