"""A routing memory against fine-tuning the routers alone, on the same reference tokens.

    python examples/router_only_baseline.py                                     # the shipped lab model, offline
    python examples/router_only_baseline.py --model allenai/OLMoE-1B-7B-0924 --dataset a.jsonl --test-dataset b.jsonl

Router-only fine-tuning: AdamW, learning rate 3e-3 on the gates, no decay, gradient norm clipped to 1.0, 3 epochs,
16 x 256 tokens a step. Both methods get the same references and are compared on the same held-out text.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from knnmoe_hf import KNNMoETrainer, KNNMoETrainingArguments
from knnmoe_hf.baselines import make_method
from knnmoe_hf.cli.data import load_examples
from knnmoe_hf.evaluation import Change, Scores, paired_bootstrap, score
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.tasks.items import text_items


def changes(base: dict[str, Scores], after: dict[str, Scores]) -> dict[str, tuple[Change, Change]]:
    """By name of the text: changes of the NLL (nats per token) and of the accuracy (share of tokens)."""
    return {
        name: tuple(paired_bootstrap(base[name], after[name], metric) for metric in ("nll", "hits")) for name in base
    }


def cell(nll: Change, hits: Change) -> str:
    """Both changes with their 95 % intervals, the accuracy in percentage points."""
    return f"{nll.text()}, accuracy {hits.text(100, 2)}"


def main(argv: list[str] | None = None) -> dict[str, dict[str, tuple[Change, Change]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(LAB_MODELS["olmoe"]))
    parser.add_argument("--dataset", default="lab:topics/reference")
    parser.add_argument("--test-dataset", default="lab:topics/test")
    parser.add_argument("--off-dataset", default="lab:python/test")
    parser.add_argument("--max-tokens", type=int, default=10000, help="of the references; default 10000")
    parser.add_argument("--test-examples", type=int, default=32, help="of each test; default 32")
    options = parser.parse_args(argv)

    set_seed(42)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    references = load_examples(options.dataset, tokenizer, max_tokens=options.max_tokens)
    tests = {
        name: load_examples(name, tokenizer, max_examples=options.test_examples)
        for name in (options.test_dataset, options.off_dataset)
    }
    base = {name: score(model, rows) for name, rows in tests.items()}

    method = make_method("router_only")
    method.fit(model, text_items(references))
    with method.apply(model) as tuned:
        table = {"router-only": changes(base, {name: score(tuned, rows) for name, rows in tests.items()})}

    arguments = KNNMoETrainingArguments(output_dir="router-only-out", report_to="none")
    trainer = KNNMoETrainer(model=model, args=arguments, train_dataset=references, processing_class=tokenizer)
    trainer.train()
    table["memory"] = changes(base, {name: score(model, rows) for name, rows in tests.items()})

    print(f"{'':12}  " + " | ".join(f"{name} (base NLL {scores.mean_nll:.4f})" for name, scores in base.items()))
    for method, found in table.items():
        print(f"{method:12}  " + " | ".join(cell(*pair) for pair in found.values()))
    return table


if __name__ == "__main__":
    main()
