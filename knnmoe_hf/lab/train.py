"""Trains the lab models from scratch: small but real MoE language models that need no network.

    python -m knnmoe_hf.lab.train olmoe                 # knnmoe_hf/lab/olmoe, the one that is shipped
    python -m knnmoe_hf.lab.train qwen3_moe gpt_oss --steps 640 --rows-per-step 16      # model_cards/lab-*/

Seeded, with a checkpoint every 100 steps; the same command continues an interrupted training.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents, windows

VOCABULARY, WINDOW, SEED = 4096, 256, 17
_SHARED = dict(
    vocab_size=VOCABULARY,
    num_hidden_layers=4,
    num_experts_per_tok=4,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    output_router_logits=True,  # for the load-balancing loss; switched off in what is saved
    router_aux_loss_coef=0.01,
)


def build(family: str) -> torch.nn.Module:
    """A freshly initialised lab model of one family."""
    if family == "olmoe":
        sizes = dict(hidden_size=192, intermediate_size=96, num_experts=32)
        return OlmoeForCausalLM(OlmoeConfig(**_SHARED, **sizes, num_attention_heads=6, num_key_value_heads=6))
    if family == "qwen3_moe":
        sizes = dict(hidden_size=144, moe_intermediate_size=64, intermediate_size=256, num_experts=32)
        heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=36)
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SHARED, **sizes, **heads, norm_topk_prob=True))
    sizes = dict(hidden_size=144, intermediate_size=64, num_local_experts=32, sliding_window=128)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=36)
    return GptOssForCausalLM(GptOssConfig(**_SHARED, **sizes, **heads, rope_parameters={"rope_type": "default"}))


def train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the training text; the folder's own if it has one already."""
    if not (folder / "tokenizer_config.json").exists():
        bpe = ByteLevelBPETokenizer()
        texts = documents("python", "train") + documents("tables", "train")
        bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<|endoftext|>", "<|pad|>"])
        fast = PreTrainedTokenizerFast(
            tokenizer_object=bpe._tokenizer,
            eos_token="<|endoftext|>",
            pad_token="<|pad|>",
            clean_up_tokenization_spaces=False,
            model_max_length=2048,
        )
        fast.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def training_rows(tokenizer) -> Dataset:
    """Windows of the training text, with every sixth window of the repetitive tables."""
    rows = windows(documents("python", "train"), tokenizer, WINDOW)
    tables = windows(documents("tables", "train"), tokenizer, WINDOW)
    return Dataset.from_dict({"input_ids": rows + tables[::6]})


@torch.no_grad()
def held_out(model, tokenizer, kind: str, limit: int = 160) -> dict[str, float]:
    """NLL in nats per token and next-token accuracy on the held-out windows of one kind."""
    losses, hits = [], []
    for ids in torch.tensor(windows(documents(kind, "test"), tokenizer, WINDOW, limit)).split(16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"))
        hits.append(logits.argmax(-1) == ids[:, 1:])
    return {"nll": torch.cat(losses).mean().item(), "accuracy": torch.cat(hits).float().mean().item()}


def train(family: str, steps: int, rows_per_step: int, work: Path, save_steps: int = 100) -> None:
    """Trains one family, from its last checkpoint if there is one; saves model, tokenizer and `held_out.json`."""
    target = LAB_MODELS[family]
    target.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(work / "tokenizer")
    set_seed(SEED)
    model = build(family)
    checkpoint = get_last_checkpoint(work / family) if (work / family).exists() else None
    if checkpoint is not None:
        # Trainer would restore all weights but the experts', which have other names in checkpoints, and only warn
        model = type(model).from_pretrained(checkpoint, dtype=torch.float32)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    arguments = _arguments(work / family, steps, rows_per_step, save_steps)
    rows = training_rows(tokenizer)
    print(
        f"{family}: {model.num_parameters() / 1e6:.2f} M parameters, {len(rows) * WINDOW / 1e6:.2f} M tokens of text"
    )
    started = time.monotonic()
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=_collate)
    trainer.train(resume_from_checkpoint=checkpoint)
    minutes = (time.monotonic() - started) / 60
    model.config.output_router_logits = False
    model.config.use_cache = True  # Trainer switched it off
    model.eval().to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    figures = {kind: held_out(model.float(), tokenizer, kind) for kind in ("python", "tables", "topics")}
    report = {"steps": steps, "tokens": steps * rows_per_step * WINDOW, "minutes": round(minutes, 1)} | figures
    (target / "held_out.json").write_text(json.dumps(report, indent=2) + "\n")
    shutil.rmtree(work / family)
    print(json.dumps(report, indent=2))


def _arguments(folder: Path, steps: int, rows_per_step: int, save_steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=rows_per_step,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        seed=SEED,
        logging_steps=20,
        save_steps=save_steps,
        save_total_limit=1,
        report_to="none",
    )


def _collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="+", choices=sorted(LAB_MODELS))
    parser.add_argument("--steps", type=int, default=1100, help="optimiser steps")
    parser.add_argument("--rows-per-step", type=int, default=32, help="rows of 256 tokens in each step")
    parser.add_argument("--work", type=Path, default=Path("lab-checkpoints"), help="checkpoints and tokenizer")
    options = parser.parse_args()
    for family in options.family:
        train(family, options.steps, options.rows_per_step, options.work)


if __name__ == "__main__":
    main()
