"""Gain and harm of every confidence, by the token's place in its text and after a change of domain.

    python benchmarks/sweep_confidence.py                       # every lab, domain topics
    python benchmarks/sweep_confidence.py --labs olmoe --kinds headers

One memory for each lab and domain; text is validation text, which no table of results is made of. `in` and `off` are
whole windows of the domain and of other kinds; `off then in` and `in then off` change in the middle of a window.
Figures are changes of the NLL in nats per token against the frozen model. Writes benchmarks/results/confidence.md and
.json.
"""

import argparse
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it knows only its own folder

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.texts import IN_DOMAIN, KINDS, REFERENCES, WINDOW, LabTexts, spread
from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, KNNMoETrainingArguments, RoutingMemory
from knnmoe_hf.calibration.background import background_rows
from knnmoe_hf.calibration.calibrate import calibrate
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents, windows
from knnmoe_hf.models.attach import attached, detach_memory
from knnmoe_hf.models.hooks import RoutingHooks

RESULTS = Path(__file__).parent / "results"
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
    "calibrated, no fall": {"confidence": "calibrated", "stats": {"fall": 0.0}},
    "calibrated, each layer alone": {"confidence": "calibrated", "alone": True},
}
PLACES = {"1-16": (0, 16), "17-64": (16, 64), "65-256": (64, 256)}
AFTER = {"1-16 after": (128, 144), "17-64 after": (144, 192), "65-128 after": (192, 256)}


@torch.no_grad()
def nll(model: nn.Module, tokens: Tensor) -> Tensor:
    """(n, S - 1) NLL of each token but the first, in nats."""
    parts = []
    for batch in tokens.split(8):
        logits = model(batch, use_cache=False).logits[:, :-1]
        parts.append(F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none"))
    return torch.cat(parts)


def texts_of(kind: str, texts: LabTexts, tokenizer, count: int) -> dict[str, Tensor]:
    """Windows of the domain, of other kinds, and of both in one."""
    own = torch.tensor([row["input_ids"] for row in texts.validation(kind)][:count])
    others = {}
    for other in KINDS:
        if other in IN_DOMAIN and other != kind:
            others[other] = [row["input_ids"] for row in texts.validation(other)][:count]
        elif other != kind:
            short = [
                text for text in documents(other, "train") if len(text) <= 16 * WINDOW
            ]  # ordinary text is of longer
            others[other] = spread(windows(short, tokenizer, WINDOW), count)
    mixed = [row for rows in zip(*others.values()) for row in rows]
    half, pairs = WINDOW // 2, torch.tensor(mixed[: len(own)])
    return {
        "in": own,
        **{f"off: {name}": torch.tensor(rows) for name, rows in others.items()},
        "off then in": torch.cat([pairs[:, :half], own[:, :half]], dim=1),
        "in then off": torch.cat([own[:, :half], pairs[:, :half]], dim=1),
    }


def measured(
    model: nn.Module, memory: RoutingMemory, alone: bool, tests: dict[str, Tensor], base: dict[str, Tensor]
) -> dict[str, float]:
    """Change of the NLL by kind of text and place; without what layers learn of those before them if `alone`."""
    found = {}
    with attached(model, memory):
        if alone:
            for lookup in RoutingHooks.of(model).current.values():
                lookup.confidence.before = None
        for name, tokens in tests.items():
            change = nll(model, tokens) - base[name]
            found[name] = change.mean().item()
            places = AFTER if "then" in name else PLACES
            found |= {f"{name} {place}": change[:, a:b].mean().item() for place, (a, b) in places.items()}
    return found


def with_setting(model: nn.Module, memory: RoutingMemory, setting: dict, ordinary, fitted: dict) -> RoutingMemory:
    """The memory under a setting; calibrations are kept in `fitted`, by half-life."""
    options = {name: value for name, value in setting.items() if name not in ("alone", "stats")}
    changed = copy.copy(memory)
    changed.config = KNNMoEConfig.from_dict(memory.config.saved() | options)
    if options["confidence"] != "calibrated":
        return changed
    half_life = changed.config.half_life
    if half_life not in fitted:
        fitted[half_life], found = calibrate(model, changed, ordinary)
        print("half-life", half_life, found, flush=True)
    changed = copy.copy(fitted[half_life])
    changed.layers = {
        layer: replace(rows, stats=replace(rows.stats, **setting.get("stats", {})))
        for layer, rows in changed.layers.items()
    }
    return changed


def sweep(lab: str, kind: str, count: int, references: int) -> dict[str, dict[str, float]]:
    """Every setting on one lab and domain."""
    model = AutoModelForCausalLM.from_pretrained(LAB_MODELS[lab], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(LAB_MODELS[lab])
    texts = LabTexts(tokenizer)
    tests = texts_of(kind, texts, tokenizer, count)
    base = {name: nll(model, tokens) for name, tokens in tests.items()}
    arguments = KNNMoETrainingArguments(output_dir="sweep-out", report_to="none", logging_strategy="no")
    rows = texts.references(kind, 0, references)
    trainer = KNNMoETrainer(model, arguments, train_dataset=rows, config=KNNMoEConfig(confidence="rbf"))
    trainer.train()
    detach_memory(model)
    ordinary, results, fitted = background_rows(tokenizer), {}, {}
    for name, setting in SETTINGS.items():
        changed = with_setting(model, trainer.memory, setting, ordinary, fitted)
        results[name] = measured(model, changed, setting.get("alone", False), tests, base)
        print(lab, kind, name, {place: round(value, 4) for place, value in results[name].items()}, flush=True)
    return results


def markdown(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """One table for each lab and domain."""
    parts = [
        f"<!-- python benchmarks/sweep_confidence.py -->\n\n{__doc__.split('One memory', 1)[0].splitlines()[0]}\n"
    ]
    for where, rows in results.items():
        columns = list(next(iter(rows.values())))
        lines = [f"## {where}", "", "| confidence | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, row in rows.items():
            lines.append(f"| {name} | " + " | ".join(f"{row[column]:+.4f}" for column in columns) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labs", nargs="+", default=list(LAB_MODELS), choices=list(LAB_MODELS))
    parser.add_argument("--kinds", nargs="+", default=["topics"], choices=IN_DOMAIN)
    parser.add_argument("--windows", type=int, default=16, help="validation windows of the domain; default 16")
    parser.add_argument("--references", type=int, default=REFERENCES, help="windows of reference text; default 128")
    options = parser.parse_args(argv)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "confidence.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for lab in options.labs:
        for kind in options.kinds:
            results[f"{lab}, {kind}"] = sweep(lab, kind, options.windows, options.references)
            path.write_text(json.dumps(results, indent=1) + "\n")
            (RESULTS / "confidence.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
