"""Push a memory to the Hub, and use it from there as somebody else would.

python examples/share_a_memory.py                                 # a memory of the lab model, to YOUR-NAME/lab-memory
python examples/share_a_memory.py allenai/OLMoE-1B-7B-0924        # of your model, to YOUR-NAME/OLMoE-1B-7B-0924-memory

It needs a token of yours (`hf auth login`, or HF_TOKEN). The repository is private, and the text stays with you.
"""

import sys
from pathlib import Path

import torch
from huggingface_hub import whoami
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnmoe_hf import KNNMoEConfig, KNNMoEForCausalLM, KNNMoETrainer, KNNMoETrainingArguments, RoutingMemory
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents, windows


def main(base: str = str(LAB_MODELS["olmoe"]), rows: int = 16) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    references = [
        {"input_ids": ids, "labels": ids} for ids in windows(documents("topics", "reference"), tokenizer, 64, rows)
    ]
    arguments = KNNMoETrainingArguments(output_dir="shared-memory", report_to="none", save_strategy="no")
    trainer = KNNMoETrainer(
        model=model,
        args=arguments,
        config=KNNMoEConfig(confidence="context"),  # needs no calibration, so that this script is quick
        train_dataset=references,
        processing_class=tokenizer,
    )
    trainer.train()

    owner, name = whoami()["name"], "lab" if Path(base).is_dir() else base.split("/")[-1]
    repository = f"{owner}/{name}-memory"
    told = {"license": "psf-2.0", "dataset": "documentation of Python's syntax", "language": "en"}
    trainer.memory.push_to_hub(repository, private=True, model_card_kwargs=told)  # one commit, without the text
    print(f"pushed {trainer.memory} to {repository}")

    pulled = RoutingMemory.from_pretrained(repository)  # every file is checked on its way in
    print(f"pulled {pulled}; text of the references inside: {pulled.provenance.has_text}")
    if Path(base).is_dir():  # the Hub does not know this base model, so it is named here
        other = KNNMoEForCausalLM.from_pretrained(base, memory=repository, dtype=torch.float32)
    else:
        other = AutoModelForCausalLM.from_pretrained(repository, dtype=torch.float32)  # base model and memory at once

    ids = torch.tensor([references[0]["input_ids"]]).to(model.device)
    with torch.no_grad():
        same = torch.equal(model(input_ids=ids).logits, other.to(model.device)(input_ids=ids).logits)
    print(f"the pulled memory gives the same logits as the one that was built: {same}")


if __name__ == "__main__":
    main(*sys.argv[1:])
