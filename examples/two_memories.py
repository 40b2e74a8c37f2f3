"""Two memories on one model: each for its own text, switched for a block, for a thread, or for the process.

python examples/two_memories.py                                   # the shipped lab model, offline
python examples/two_memories.py allenai/OLMoE-1B-7B-0924          # your model
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnmoe_hf import (
    KNNMoEConfig,
    KNNMoETrainer,
    KNNMoETrainingArguments,
    attach_memory,
    detach_memory,
    disable_memory,
    use_memory,
)
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents, windows

KINDS = {"documentation": "topics", "headers": "headers"}


def main(base: str = str(LAB_MODELS["olmoe"]), rows: int = 48) -> dict[tuple[str, str], float]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    @torch.no_grad()
    def nll(kind: str) -> float:
        held_out = torch.tensor(windows(documents(kind, "test"), tokenizer, 128, 16)).to(model.device)
        return model(input_ids=held_out, labels=held_out).loss.item()

    memories = {}
    for name, kind in KINDS.items():
        references = windows(documents(kind, "reference"), tokenizer, 128, rows)
        trainer = KNNMoETrainer(
            model=model,
            args=KNNMoETrainingArguments(output_dir=f"{name}-out", report_to="none", save_strategy="no"),
            config=KNNMoEConfig(confidence="context"),  # needs no calibration, so that this script is quick
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in references],
            processing_class=tokenizer,
        )
        trainer.train()
        memories[name] = trainer.memory
        detach_memory(model)  # the trainer attaches what it has built

    for name, memory in memories.items():
        attach_memory(model, memory, name=name)

    # use_memory decides for the calling thread or asyncio task alone, set_memory(model, name) for the process
    found = {}
    for text, kind in KINDS.items():
        with disable_memory(model):
            found[text, "no memory"] = nll(kind)
        for name in memories:
            with use_memory(model, name):
                found[text, name] = nll(kind)
    print("NLL, nats per token, of held-out text")
    for text in KINDS:
        print(f"  {text:14}", ", ".join(f"{name} {found[text, name]:.3f}" for name in ("no memory", *memories)))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
