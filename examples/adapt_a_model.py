"""The whole path in a few lines: build a memory, save it, load it, compare the model with and without it.

python examples/adapt_a_model.py                                            # the shipped lab model, offline
python examples/adapt_a_model.py allenai/OLMoE-1B-7B-0924 my-texts.jsonl    # rows of {"text": ...}
"""

import sys

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnmoe_hf import KNNMoETrainer, KNNMoETrainingArguments, disable_memory
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents


def main(base: str = str(LAB_MODELS["olmoe"]), texts: str | None = None, folder: str = "my-memory") -> None:
    if texts is None:
        paragraphs = [part for text in documents("topics", "reference") for part in text.split("\n\n")]
        dataset = Dataset.from_dict({"text": [part for part in paragraphs if len(part) > 200][:64]})
    else:
        dataset = load_dataset("json", data_files=texts, split="train")
    split = dataset.train_test_split(test_size=0.2, seed=0)

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer = KNNMoETrainer(
        model=model,
        args=KNNMoETrainingArguments(output_dir=folder, max_length=256, report_to="none"),
        train_dataset=split["train"],
        eval_dataset=split["test"],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    print(trainer.evaluate())

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # the base model, memory attached
    prompt = tokenizer(split["test"][0]["text"][:80], return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))
    with disable_memory(model):
        print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
