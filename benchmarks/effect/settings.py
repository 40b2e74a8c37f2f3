"""Every setting that is measured, and where: the one file of the benchmark that knows the library's options.

A setting of a memory names only what differs from the default, so the benchmark follows the defaults.
"""

import functools
import json
from dataclasses import asdict, dataclass, field, fields, replace

from benchmarks.builds import RAW, training_arguments
from benchmarks.effect.competitors import RATES
from benchmarks.texts import REFERENCES
from knnmoe_hf import KNNMoEConfig
from knnmoe_hf.training.options import BuildOptions

MEMORIES, COMPETITORS, REFERENCE_COUNTS = "the memory", "competitors", "number of references"
WEIGHTS, KNN_LM = "weight of the next tokens", "kNN-LM"
LABS = {"olmoe": "lab OLMoE", "qwen3_moe": "lab Qwen3-MoE", "gpt_oss": "lab GPT-OSS"}
"""The lab models that every setting is measured on; the others, one for each other routing rule, have the default."""
GROUPS = (
    MEMORIES,
    COMPETITORS,
    WEIGHTS,
    KNN_LM,
    "builders",
    "value spaces",
    "confidence",
    "keys and values",
    "neighbours",
    "rows",
    REFERENCE_COUNTS,
)


@dataclass(frozen=True)
class Setting:
    """
    One row of the tables.

    Attributes:
        name: unique.
        group: one of `GROUPS`.
        competitor: a key of `benchmarks.effect.competitors.COMPETITORS`; None for a memory.
        rate: learning rate of a competitor; None for the best of its `RATES` on validation text, or its only one.
        config: options of `KNNMoEConfig`.
        build: options of `KNNMoETrainingArguments`.
        background: kinds of background text for `confidence="calibrated"`; None for the library's own choice.
        references: windows of reference text; fewer if there are no more.
    """

    name: str
    group: str
    competitor: str | None = None
    rate: float | None = None
    config: dict = field(default_factory=dict)
    build: dict = field(default_factory=dict)
    background: tuple[str, ...] | None = None
    references: int = REFERENCES

    def options(self) -> dict:
        """All values that decide what is measured, defaults included, as they come back from JSON."""
        found = {name: value for name, value in asdict(self).items() if name not in ("name", "group")}
        if self.competitor is None:
            arguments = training_arguments(self.build)
            names = (option.name for option in fields(BuildOptions) if option.name not in _OF_FILES)
            found["config"] = asdict(KNNMoEConfig(**self.config).retrieval_options())
            found["build"] = {name: getattr(arguments, name) for name in names}
        return json.loads(json.dumps(found, default=str))


_OF_FILES = (  # options that decide how data is read and memories are saved, and not what is measured
    "dataset_text_field",
    "ignore_columns",
    "skip_bad_rows",
    "save_provenance",
    "allow_overlap",
    "overwrite",
)
_PAPER = RAW | {"confidence": "rbf", "gamma": 0.9}  # the gamma that did best with it on validation text
DEFAULT = Setting("memory, default", MEMORIES)
TOKENS = Setting("memory, next tokens", MEMORIES, config={"recall": "next_tokens"})
BOTH = Setting("memory, both", MEMORIES, config={"recall": "both"})
PAPER = tuple(
    Setting(f"paper, {version} ({space})", MEMORIES, config=_PAPER | {"value_space": space}, build={"builder": "topk"})
    for version, space in (("v1", "assignment"), ("v2", "logits"))
)
_TUNED = {name: Setting(name, COMPETITORS, name) for name in ("router-only", "LoRA", "full fine-tuning")}
METHODS = (DEFAULT, TOKENS, BOTH, *PAPER, *_TUNED.values())


def _memory(group: str, name: str, build: dict | None = None, **config) -> Setting:
    return Setting(name, group, config=config, build=build or {})


def _rates(name: str) -> tuple[Setting, ...]:
    return tuple(Setting(f"{name} at {rate:g}", COMPETITORS, name, rate) for rate in RATES[name])


def _constant(weight: float, name: str = "kNN-LM", **config) -> Setting:
    """Next tokens with one weight whatever the neighbours are: the confidence is 1 with gamma 0."""
    plain = {"recall": "next_tokens", "confidence": "rbf", "gamma": 0.0, "next_token_weight": weight}
    return Setting(f"{name}, weight {weight:g}", KNN_LM, config=plain | config)


_BOTH_WEIGHTS = (0.1, 0.2, 0.4, 0.6)
RAW_KNN_LM = "kNN-LM, raw keys, 256 neighbours"
OPEN = tuple(_memory("confidence", f"rbf, gamma {g:g}", confidence="rbf", gamma=g) for g in (0.3, 0.9, 2.0))
WEIGHED = tuple(_memory(WEIGHTS, f"both, weight {w:g}", recall="both", next_token_weight=w) for w in _BOTH_WEIGHTS)
PLAIN = tuple(_constant(weight) for weight in (0.1, 0.25, 0.5))
PLAIN_RAW = tuple(_constant(weight, RAW_KNN_LM, **RAW, next_token_neighbors=256) for weight in (0.25, 0.5))
LORA_RATES = _rates("LoRA")
MAIN = (*METHODS, *OPEN, *WEIGHED, *PLAIN, *PLAIN_RAW, *LORA_RATES)
"""Measured for every lab, kind of text and seed."""

_VARIANTS = (
    _memory(COMPETITORS, "unoptimised values", {"builder": "topk", "builder_steps": 1, "learning_rate": 0.0}),
    Setting("constant bias", COMPETITORS, "constant bias"),
    *_rates("constant bias"),
    *(_memory("builders", f"builder {name}", {"builder": name}) for name in ("topk", "candidates", "search")),
    *(_memory("value spaces", f"values {space}", value_space=space) for space in ("logits", "delta", "assignment")),
    *(_memory("confidence", f"context, {t:g}", confidence="context", context_threshold=t) for t in (0.88, 0.96)),
    _memory("confidence", "calibrated", confidence="calibrated"),
    replace(_memory("confidence", "calibrated on python alone", confidence="calibrated"), background=("python",)),
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
    _memory("rows", "2 layers of 4", {"num_layers": 2}),
)

COUNTS = (16, 64, 256)
"""Windows of reference text, besides `REFERENCES`, for the default memory and two competitors."""
COUNTED = tuple(
    replace(setting, name=f"{setting.name}, {count} windows", group=REFERENCE_COUNTS, references=count)
    for count in COUNTS
    for setting in (DEFAULT, BOTH, _TUNED["router-only"], _TUNED["LoRA"])
)


@functools.cache
def grid() -> tuple[Setting, ...]:
    """Every setting; a variant that is the default is left out."""
    default = DEFAULT.options()
    return (*MAIN, *(setting for setting in _VARIANTS if setting.options() != default), *COUNTED)


GRID_LAB, GRID_KIND, SEEDS = "olmoe", "topics", (0, 1)
"""The whole grid is measured on this lab model and kind with the first seed; `COUNTED` on all lab models."""
SEEDS_OF = {"topics": SEEDS, "headers": SEEDS[:1], "notices": SEEDS[:1]}


def planned(lab: str, kind: str, seed: int) -> tuple[Setting, ...]:
    """What is measured on a lab model with references of a kind that were drawn by a seed."""
    if (kind, seed) != (GRID_KIND, SEEDS[0]):
        return MAIN
    return grid() if lab == GRID_LAB else (*MAIN, *COUNTED)
