"""What was tried and is not in the library, beside what is: anchor rows, and keys weighted by the experts' clusters.

    python benchmarks/tried.py                      # lab OLMoE, domain topics
    python benchmarks/tried.py --lab gpt_oss

Anchor rows are ordinary text in the memory, with the gate's own logits as values. Cluster weights divide each
dimension of a gate's input by its spread within the tokens of one expert (the idea of the AC router) before the main
axes are taken. Text is validation text; figures are changes of the NLL in nats per token. Writes
benchmarks/results/tried.md and .json.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, it knows only its own folder

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.settings import RAW, training_arguments
from benchmarks.sweep_confidence import RESULTS, measured, nll, texts_of
from benchmarks.texts import IN_DOMAIN, REFERENCES, LabTexts
from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, RoutingMemory, calibrate, detach_memory
from knnmoe_hf.calibration.background import background_rows
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.models.gates import find_gates, gate_logits


def build(model: nn.Module, rows: list[dict], config: KNNMoEConfig, **options) -> RoutingMemory:
    """A memory of some rows, not attached."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = KNNMoETrainer(model, training_arguments(options, folder), train_dataset=rows, config=config)
        trainer.train()
    detach_memory(model)
    return trainer.memory


def with_anchors(model: nn.Module, memory: RoutingMemory, ordinary: dict[str, list[dict]]) -> RoutingMemory:
    """With ordinary text in it, whose values are the gate's own logits: a build that learns nothing."""
    rows = [row for kind in ordinary.values() for row in kind]
    rows = [row | {"example_id": index} for index, row in enumerate(rows)]
    anchors = build(model, rows, memory.config, builder="topk", builder_steps=1, learning_rate=0.0)
    return memory.merge(anchors)


def cluster_weighted(model: nn.Module, raw: RoutingMemory, config: KNNMoEConfig) -> RoutingMemory:
    """The memory under keys whose dimensions count the more, the less they vary among the tokens of one expert."""
    names = ("confidence", "key_codec", "key_dtype", "value_dtype", "value_experts")
    weighted = raw.recoded(model, **{name: getattr(config, name) for name in names})
    for gate in find_gates(model):
        rows = raw.layers[gate.layer]
        x, ids = rows.decoded_keys, raw.provenance.example_ids
        logits = gate_logits(gate, x)
        chosen = torch.nn.functional.one_hot(logits.argmax(dim=-1), gate.num_experts).float()  # (N, E)
        means = chosen.T @ x / chosen.sum(dim=0).clamp_min(1)[:, None]
        weight = (x - chosen @ means).square().mean(dim=0).sqrt().reciprocal()  # (d,)
        found = LayerRows.encoded(x * weight, logits, rows.decoded_values, ids, config)
        encoder = replace(found.encoder, weight=found.encoder.weight * weight)
        weighted.layers[gate.layer] = replace(found, encoder=encoder)
    return weighted


def variants(model: nn.Module, rows: list[dict], ordinary: dict[str, list[dict]]):
    """Each of the memories that are compared, by name."""
    default = KNNMoEConfig()
    raw = build(model, rows, KNNMoEConfig(**RAW, confidence="rbf"))
    stored = {name: getattr(default, name) for name in ("key_codec", "key_dtype", "value_dtype", "value_experts")}
    for confidence in ("rbf", "context"):
        memory = raw.recoded(model, **stored, confidence=confidence)
        yield confidence, memory
        yield f"{confidence}, anchor rows", with_anchors(model, memory, ordinary)
        config = KNNMoEConfig(confidence=confidence)
        yield f"{confidence}, keys weighted by clusters", cluster_weighted(model, raw, config)
    yield "calibrated", calibrate(model, raw.recoded(model, **stored, confidence="calibrated"), ordinary)[0]
    weighted = calibrate(model, cluster_weighted(model, raw, default), ordinary)[0]
    yield "calibrated, keys weighted by clusters", weighted


def markdown(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """One table for each lab and domain."""
    parts = ["<!-- python benchmarks/tried.py -->\n\nWhat was tried and is not in the library, beside what is.\n"]
    for where, rows in results.items():
        columns = list(next(iter(rows.values())))
        lines = [f"## {where}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(f"{row[c]:+.4f}" for c in columns) + " |" for name, row in rows.items()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", default="olmoe", choices=list(LAB_MODELS))
    parser.add_argument("--kind", default="topics", choices=IN_DOMAIN)
    parser.add_argument("--windows", type=int, default=16, help="validation windows of each kind; default 16")
    parser.add_argument("--references", type=int, default=REFERENCES, help="windows of reference text; default 128")
    options = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(LAB_MODELS[options.lab], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(LAB_MODELS[options.lab])
    texts = LabTexts(tokenizer)
    tests = texts_of(options.kind, texts, tokenizer, options.windows)
    tests = {name: tokens for name, tokens in tests.items() if "then" not in name}
    base = {name: nll(model, tokens) for name, tokens in tests.items()}
    path = RESULTS / "tried.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    found = results[f"{options.lab}, {options.kind}"] = {}
    rows = texts.references(options.kind, 0, options.references)
    for name, memory in variants(model, rows, background_rows(tokenizer)):
        changes = measured(model, memory, False, tests, base)
        found[name] = {text: changes[text] for text in tests}
        print(name, {place: round(value, 4) for place, value in found[name].items()}, flush=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "tried.md").write_text(markdown(results))


if __name__ == "__main__":
    main()
