"""Gain and harm of every confidence, by the token's place in its text and after a change of domain.

    python -m benchmarks.sweeps.confidence                       # every lab, domain topics
    python -m benchmarks.sweeps.confidence --labs olmoe --kinds headers

One memory for each lab and domain, judged on validation text. `in` and `off` are whole windows of the domain and of
other kinds; in `off then in` and `in then off` the kind changes in the middle of a window. Figures are changes of the
NLL in nats per token against the frozen model. `confidence.json` and `.md` keep earlier runs, in tables by commit.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.builds import training_arguments
from benchmarks.effect.settings import LABS
from benchmarks.pages import DTYPES, add_dtype, parser, provenance, table, write
from benchmarks.texts import IN_DOMAIN, KINDS, REFERENCES, WINDOW, LabTexts
from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, RoutingMemory, attach_memory, calibrate, detach_memory
from knnmoe_hf.calibration.background import machine_background
from knnmoe_hf.lab import LAB_MODELS

MODULE = "benchmarks.sweeps.confidence"
SETTINGS: dict[str, dict] = {
    "rbf, gamma 0.3": {"confidence": "rbf"},
    "rbf, gamma 1": {"confidence": "rbf", "gamma": 1.0},
    "context": {"confidence": "context"},
    **{f"context, half-life {h}": {"confidence": "context", "half_life": h} for h in (8.0, 16.0, 48.0)},
    **{f"context, opens at {t}": {"confidence": "context", "context_threshold": t} for t in (0.8, 0.92, 0.96)},
    "calibrated": {"confidence": "calibrated"},
    **{f"calibrated, half-life {h}": {"confidence": "calibrated", "half_life": h} for h in (8.0, 16.0, 48.0)},
    **{
        f"calibrated, opens at {t}": {"confidence": "calibrated", "stats": {"threshold": t}}
        for t in (0.3, 0.5, 0.7, 0.9)
    },
    "calibrated, width 0.1": {"confidence": "calibrated", "stats": {"width": 0.1}},
    "calibrated, no drift": {"confidence": "calibrated", "stats": {"reference_drift": 0.0, "background_drift": 0.0}},
    "calibrated, no open shift": {"confidence": "calibrated", "stats": {"open_shift": 0.0}},
}
"""Options of `KNNMoEConfig` that differ from the default; `stats` are fields of the fitted `CalibrationStats`."""
PLACES = {"1-16": (0, 16), "17-64": (16, 64), "65-256": (64, 256)}
AFTER = {"1-16 after": (128, 144), "17-64 after": (144, 192), "65-128 after": (192, 256)}


@torch.no_grad()
def nll(model: nn.Module, tokens: Tensor) -> Tensor:
    """(n, S - 1) NLL in nats of each token of (n, S) but the first."""
    parts = []
    for batch in tokens.split(8):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        parts.append(F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none"))
    return torch.cat(parts)


def read(kind: str, texts: LabTexts, count: int) -> dict[str, Tensor]:
    """(n, 256) windows of the domain, of the other kinds, and of both in one, by name."""

    def tokens(rows: list[dict]) -> Tensor:
        return torch.tensor([row["input_ids"] for row in rows])

    own = tokens(texts.validation(kind, count))
    off = {
        other: tokens(texts.validation(other, count) if other in IN_DOMAIN else texts.trained_on(other, count))
        for other in KINDS
        if other != kind
    }
    mixed = torch.stack([row for rows in zip(*off.values()) for row in rows][: len(own)])
    half = WINDOW // 2
    return {
        "in": own,
        **{f"off: {name}": rows for name, rows in off.items()},
        "off then in": torch.cat([mixed[:, :half], own[:, :half]], dim=1),
        "in then off": torch.cat([own[:, :half], mixed[:, :half]], dim=1),
    }


def measured(model: nn.Module, memory: RoutingMemory, tests: dict[str, Tensor], base: dict[str, Tensor]) -> dict:
    """Change of the NLL by kind of text and place."""
    attach_memory(model, memory)
    found = {}
    try:
        for name, tokens in tests.items():
            change = nll(model, tokens) - base[name]
            found[name] = change.mean().item()
            places = AFTER if "then" in name else PLACES
            found |= {f"{name} {place}": change[:, a:b].mean().item() for place, (a, b) in places.items()}
    finally:
        detach_memory(model)
    return found


def with_stats(memory: RoutingMemory, **stats) -> RoutingMemory:
    """The memory with other constants of its calibration."""
    layers = memory.layers.items()
    return replace(memory, layers={layer: replace(rows, stats=replace(rows.stats, **stats)) for layer, rows in layers})


def sweep(lab: str, kind: str, options) -> dict[str, dict[str, float]]:
    """Every setting on one lab and domain."""
    model = AutoModelForCausalLM.from_pretrained(LAB_MODELS[lab], dtype=DTYPES[options.dtype]).eval()
    tokenizer = AutoTokenizer.from_pretrained(LAB_MODELS[lab])
    texts, background, results, fitted = LabTexts(tokenizer), machine_background(tokenizer), {}, {}
    tests = read(kind, texts, options.windows)
    base = {name: nll(model, tokens) for name, tokens in tests.items()}
    with tempfile.TemporaryDirectory() as folder:
        rows = texts.references(kind, 0, options.references)
        arguments = training_arguments({}, folder)
        trainer = KNNMoETrainer(model, arguments, train_dataset=rows, config=KNNMoEConfig(confidence="rbf"))
        trainer.train()
        detach_memory(model)
        trainer.save_model(Path(folder) / "memory")
        for name, setting in SETTINGS.items():
            changed = {option: value for option, value in setting.items() if option != "stats"}
            memory = RoutingMemory.from_pretrained(Path(folder) / "memory", **changed)
            if changed["confidence"] == "calibrated":
                half_life = memory.config.half_life
                if half_life not in fitted:
                    fitted[half_life], _ = calibrate(model, memory, background)
                memory = with_stats(fitted[half_life], **setting.get("stats", {}))
            results[name] = measured(model, memory, tests, base)
            print(lab, kind, name, {place: round(value, 4) for place, value in results[name].items()}, flush=True)
    return results


def report(results: dict[str, dict]) -> str:
    """The page: a table for each lab, domain and commit."""
    parts = [
        "Written by `python -m benchmarks.sweeps.confidence`. Change of the NLL in nats per token against the frozen "
        "model, on validation text.",
        "Tables of commit 62dcd4e were made by `benchmarks/sweep_confidence.py` there. The confidence cdf and layers "
        "that share no evidence (*each layer alone*) are at that commit alone; *fall* is `open_shift` now.",
    ]
    for where, rows in results.items():
        columns = list(next(iter(rows.values())))
        lines = ([name, *(f"{row[column]:+.4f}" for column in columns)] for name, row in rows.items())
        parts += [f"## {where}", table(["confidence", *columns], lines)]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--labs", nargs="+", default=list(LABS), choices=list(LAB_MODELS))
    add("--kinds", nargs="+", default=["topics"], choices=IN_DOMAIN)
    add("--windows", type=int, default=16, help="validation windows of the domain; default 16")
    add("--references", type=int, default=REFERENCES, help="windows of reference text; default 128")
    add_dtype(options)
    options = options.parse_args(argv)
    path, made = options.results / "confidence.json", provenance(MODULE, argv)
    results = json.loads(path.read_text()) if path.exists() else {}
    for lab in options.labs:
        for kind in options.kinds:
            results[f"{lab}, {kind} (commit {made['commit']}, `{made['command']}`)"] = sweep(lab, kind, options)
            write(options.results, "confidence", results, report(results))


if __name__ == "__main__":
    main()
