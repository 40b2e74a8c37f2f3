"""
Writes one of the memories of this folder, with whichever version of the library is imported (see README.md).

    python write_memory.py MODEL FOLDER

makes the model if its folder is not there, builds a memory of tokens drawn from a seed, saves it, and stores what the
model with the memory computes for other tokens.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from knnmoe_hf import KNNMoEConfig, KNNMoETrainer, KNNMoETrainingArguments

VOCABULARY, LENGTH = 64, 24
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=16,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)


def tokens(rows: int, low: int, high: int, seed: int) -> torch.Tensor:
    """(rows, LENGTH) token ids of a walk in small steps between two ids: a token tells something of the next."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(low, high, (rows, 1), generator=generator)
    steps = torch.randint(1, 4, (rows, LENGTH), generator=generator).cumsum(dim=1)
    return low + (start - low + steps) % (high - low)


def dataset(ids: torch.Tensor) -> list[dict]:
    return [{"input_ids": row, "labels": row} for row in ids.tolist()]


def main(model_folder: Path, folder: Path) -> None:
    if not model_folder.is_dir():
        torch.manual_seed(0)
        OlmoeForCausalLM(OlmoeConfig(**SIZES, initializer_range=0.3)).bfloat16().save_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.config._name_or_path = "made-up/tiny-olmoe"
    args = KNNMoETrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    background = {"other": dataset(tokens(12, 32, 64, 2))}
    config = KNNMoEConfig(num_neighbors=4, key_dim=8, value_experts=4, search_backend="torch")
    references = dataset(tokens(16, 0, 32, 1))
    trainer = KNNMoETrainer(model, args, train_dataset=references, ordinary_dataset=background, config=config)
    trainer.train()
    trainer.save_model(str(folder))
    ids = torch.cat([tokens(1, 0, 32, 3), tokens(1, 32, 64, 4)])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    save_file({"input_ids": ids, "logits": logits.contiguous()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
