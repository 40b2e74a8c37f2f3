"""A memory beside a LoRA: the adapter changes the weights, the memory the routing; each can be switched off.

python examples/beside_a_lora.py                                  # the shipped lab model, offline
python examples/beside_a_lora.py allenai/OLMoE-1B-7B-0924         # your model
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, KNNMoETrainingArguments, disable_memory
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents, windows


def main(base: str = str(LAB_MODELS["olmoe"]), rows: int = 64, steps: int = 12) -> dict[str, float]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4))

    # first the adapter: a memory belongs to the model as it is when the memory is built, adapter included
    ids = torch.tensor(windows(documents("topics", "reference"), tokenizer, 128, rows)).to(model.device)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-3)
    model.train()
    for step in range(steps):
        batch = ids[step * 8 % rows :][:8]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained("the-adapter")

    # then the memory, with neither the weights nor the adapter changed
    trainer = KNNMoETrainer(
        model=model,
        args=KNNMoETrainingArguments(output_dir="memory-beside-it", report_to="none"),
        config=KNNMoEConfig(confidence="context", recall="both"),  # needs no calibration, so that this is quick
        train_dataset=[{"input_ids": row, "labels": row} for row in ids.tolist()],
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()

    held_out = torch.tensor(windows(documents("topics", "test"), tokenizer, 128, 16)).to(model.device)

    def loss() -> float:
        with torch.no_grad():
            return model(input_ids=held_out, labels=held_out).loss.item()

    found = {"adapter and memory": loss()}
    with disable_memory(model):
        found["adapter alone"] = loss()
        with model.disable_adapter():
            found["neither"] = loss()
    for name, nll in found.items():
        print(f"NLL of held-out text, {name}: {nll:.3f} nats per token")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
