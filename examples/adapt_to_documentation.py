"""Adapt a model to your documentation: build a memory of it, save it, load it back, compare with and without it.

python examples/adapt_to_documentation.py                                       # the shipped lab model, offline
python examples/adapt_to_documentation.py allenai/OLMoE-1B-7B-0924 docs         # your model, a folder of *.md or *.txt
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnmoe_hf import KNNMoETrainer, KNNMoETrainingArguments, disable_memory
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents


def paragraphs(folder: str | None) -> list[str]:
    """Paragraphs of some length, of your files or, without any, of the documentation of Python's syntax."""
    if folder is None:
        texts = documents("topics", "reference")
    else:
        files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".md", ".txt", ".rst"))
        texts = [path.read_text(encoding="utf-8") for path in files]
    return [part for text in texts for part in text.split("\n\n") if len(part) > 200]


def main(base: str = str(LAB_MODELS["olmoe"]), folder: str | None = None, output: str = "my-memory") -> None:
    found = paragraphs(folder)
    dataset = Dataset.from_dict({"text": found if folder else found[:80]})
    split = dataset.train_test_split(test_size=0.2, seed=0)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = KNNMoETrainer(
        model=model,
        args=KNNMoETrainingArguments(output_dir=output, max_length=256, report_to="none"),
        train_dataset=split["train"],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()  # keys, values and a card: never the model's weights
    print("\n".join(trainer.memory.verdict.sentences()))

    scores = trainer.evaluate(split["test"])
    print(f"NLL of held-out paragraphs: {scores['eval_base_loss']:.3f} without it, {scores['eval_loss']:.3f} with it")

    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)  # the base model, memory attached
    prompt = tokenizer(split["test"][0]["text"][:80], return_tensors="pt").to(model.device)
    print("with it:   ", tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))
    with disable_memory(model):  # bit for bit the base model
        print("without it:", tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
