"""A memory on a PEFT-wrapped model: LoRA changes the weights, the memory the routing; each can be switched off.

python examples/with_peft.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnmoe_hf import KNNMoETrainer, KNNMoETrainingArguments, disable_memory
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents, windows


def main(base: str = str(LAB_MODELS["olmoe"]), rows: int = 8) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=4))

    # a memory belongs to the model as it is when the memory is built, adapter included: train the adapter before
    examples = [
        {"input_ids": ids, "labels": ids} for ids in windows(documents("topics", "reference"), tokenizer, 64, rows)
    ]
    arguments = KNNMoETrainingArguments(output_dir="peft-out", report_to="none")
    trainer = KNNMoETrainer(model=model, args=arguments, train_dataset=examples, processing_class=tokenizer)
    trainer.train()

    ids = torch.tensor([examples[0]["input_ids"]])
    with torch.no_grad():
        both = model(input_ids=ids).logits
        with disable_memory(model):
            adapter_alone = model(input_ids=ids).logits
            with model.disable_adapter():
                neither = model(input_ids=ids).logits
    print(f"memory moves the logits by up to {(both - adapter_alone).abs().max():.3f}")
    print(f"the untrained adapter by {(adapter_alone - neither).abs().max():.3f}")


if __name__ == "__main__":
    main()
