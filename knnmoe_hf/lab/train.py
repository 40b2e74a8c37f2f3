"""Trains the lab models from scratch: small but real MoE language models that need no network.

    python -m knnmoe_hf.lab.train olmoe                 # knnmoe_hf/lab/olmoe, the one that is shipped
    python -m knnmoe_hf.lab.train qwen3_moe gpt_oss --steps 640 --rows-per-step 16      # model_cards/lab-*/
    python -m knnmoe_hf.lab.train deepseek_v3 --steps 1200 --rows-per-step 8
    python -m knnmoe_hf.lab.train minimax_m2 ernie4_5_moe --steps 600 --rows-per-step 8
    python -m knnmoe_hf.lab.train deepseek_v2 --steps 600 --rows-per-step 4

Seeded, with a checkpoint every 100 steps; the same command continues an interrupted training.
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.trainer_utils import get_last_checkpoint

from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents, windows
from knnmoe_hf.models.gates import router_classes
from knnmoe_hf.models.precision import is_fast_on_cpu

VOCABULARY, WINDOW, SEED = 4096, 256, 17
BALANCING_LOSS, BIAS_STEP = 0.01, 0.001
_SHARED = dict(
    vocab_size=VOCABULARY,
    num_hidden_layers=4,
    num_experts_per_tok=4,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
# for the load-balancing loss, which models without correction biases need; switched off in what is saved
_LOSS = dict(output_router_logits=True, router_aux_loss_coef=BALANCING_LOSS)
_FINE = dict(hidden_size=144, num_attention_heads=4, num_key_value_heads=2, head_dim=36)
_SMALL = dict(hidden_size=128, num_attention_heads=4)
_DENSE_FIRST = dict(intermediate_size=256, moe_intermediate_size=64)  # width of the first layer, and of the experts
_LATENT = dict(q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32)
_GROUPS = dict(n_routed_experts=16, n_group=4, topk_group=2, n_shared_experts=1, first_k_dense_replace=1)
_DEEPSEEK = _SMALL | _DENSE_FIRST | _LATENT | _GROUPS
CONFIGS: dict[str, dict] = {
    "olmoe": _LOSS
    | dict(hidden_size=192, num_attention_heads=6, num_key_value_heads=6)
    | dict(intermediate_size=96, num_experts=32),
    "qwen3_moe": _LOSS
    | _FINE
    | dict(moe_intermediate_size=64, intermediate_size=256, num_experts=32, norm_topk_prob=True),
    "gpt_oss": _LOSS
    | _FINE
    | dict(intermediate_size=64, num_local_experts=32, sliding_window=128, rope_parameters={"rope_type": "default"}),
    "deepseek_v2": _LOSS | _DEEPSEEK | dict(topk_method="group_limited_greedy", routed_scaling_factor=2.0),
    "deepseek_v3": _DEEPSEEK | dict(norm_topk_prob=True, routed_scaling_factor=2.5, num_mtp_layers=0),
    "minimax_m2": _SMALL
    | dict(num_hidden_layers=3, num_key_value_heads=2, head_dim=32)
    | dict(intermediate_size=64, num_local_experts=16),
    "ernie4_5_moe": _SMALL
    | _DENSE_FIRST
    | dict(num_key_value_heads=2, moe_num_experts=16, moe_num_shared_experts=1, moe_layer_start_index=1),
}
"""Options of each lab model's configuration, by model type, beside those that all share."""


def build(family: str) -> nn.Module:
    """A freshly initialised lab model of one family."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **_SHARED | CONFIGS[family]))


def routers(model: nn.Module) -> list[tuple[nn.Module, Tensor | None]]:
    """Each router with its correction bias (E,) or (1, E), or None: added to the scores for the choice alone."""
    classes, found = router_classes(model), []
    for block in model.modules():
        for router in (child for child in block.children() if isinstance(child, classes)):
            tensors = [*block.named_parameters(), *block.named_buffers()]
            found.append((router, next((t for name, t in tensors if name.endswith("e_score_correction_bias")), None)))
    return found


class ExpertLoad(TrainerCallback):
    """
    Counts how often each expert is chosen; in a training, moves correction biases against it after each step.

    The models with such a bias are balanced by it instead of by a loss (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    """

    def __init__(self, model: nn.Module):
        self.biases, self.counts, self.hooks = [], [], []
        for index, (router, bias) in enumerate(routers(model)):
            self.biases.append(bias)
            self.counts.append(torch.zeros(len(router.weight)))
            self.hooks.append(router.register_forward_hook(lambda _, __, out, index=index: self._count(index, out[2])))

    def _count(self, index: int, ids: Tensor) -> None:
        self.counts[index] += torch.bincount(ids.flatten(), minlength=len(self.counts[index]))

    def shares(self) -> Tensor:
        """How often each expert was chosen, (layers, E), as a share of its layer's mean."""
        counts = torch.stack(self.counts)
        return counts / counts.mean(1, keepdim=True)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        for bias, counts in zip(self.biases, self.counts, strict=True):
            if bias is not None:
                bias.data += BIAS_STEP * torch.sign(counts.mean() - counts).view_as(bias)
            counts.zero_()

    def remove(self) -> None:
        """Takes the hooks off the model."""
        for hook in self.hooks:
            hook.remove()


class BalancedTrainer(Trainer):
    """Adds the load-balancing loss that some model classes lack, for a model that returns its router logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.config.output_router_logits and "aux_loss" not in outputs:
            sizes = (model.config.num_experts, model.config.num_experts_per_tok)
            loss = loss + BALANCING_LOSS * load_balancing_loss_func(outputs.router_logits, *sizes)
        return (loss, outputs) if return_outputs else loss


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


def expert_load(model: nn.Module, tokenizer) -> dict[str, float]:
    """How often the least and the most chosen expert of any layer is chosen on held-out sources; 1 is the mean."""
    load = ExpertLoad(model)
    held_out(model, tokenizer, "python")
    load.remove()
    return {"least": load.shares().min().item(), "most": load.shares().max().item()}


def _to_bfloat16(model: nn.Module) -> nn.Module:
    """All but correction biases, which released models keep in float32 too: a step is finer than bfloat16."""
    kept = [bias if bias is None else bias.data.clone() for _, bias in routers(model)]
    model.to(torch.bfloat16)
    for (_, bias), values in zip(routers(model), kept, strict=True):
        if bias is not None:
            bias.data = values
    return model


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
    load = ExpertLoad(model)
    trainer = BalancedTrainer(model, arguments, _collate, rows, callbacks=[load])
    trainer.train(resume_from_checkpoint=checkpoint)
    minutes = (time.monotonic() - started) / 60
    load.remove()
    model.config.output_router_logits = False
    model.config.use_cache = True  # Trainer switched it off
    _to_bfloat16(model.eval()).save_pretrained(target)
    tokenizer.save_pretrained(target)
    report = {"steps": steps, "tokens": steps * rows_per_step * WINDOW, "minutes": round(minutes, 1)}
    report |= {kind: held_out(model.float(), tokenizer, kind) for kind in ("python", "tables", "topics")}
    report["expert_load"] = expert_load(model, tokenizer)
    (target / "held_out.json").write_text(json.dumps(report, indent=2) + "\n")
    card = LAB_MODELS["qwen3_moe"].parent / f"lab-{family.replace('_', '-')}" / "README.md"  # also of the shipped one
    if card.exists():
        record_results(card, report)
    shutil.rmtree(work / family)
    print(json.dumps(report, indent=2))


def record_results(card: Path, report: Mapping[str, Any]) -> None:
    """Puts the held-out figures of a lab model into the metadata of its card, as `model-index`; its text stays."""
    written = ModelCard.load(card)
    results = []
    for kind in ("python", "tables", "topics"):
        text = dict(task_type="text-generation", dataset_name=f"held-out {kind}", dataset_type="custom")
        text["dataset_config"] = kind
        nll, accuracy = (round(report[kind][name], 4) for name in ("nll", "accuracy"))
        results.append(EvalResult(**text, metric_type="nll", metric_name="NLL, nats per token", metric_value=nll))
        how = "Next-token accuracy"
        results.append(EvalResult(**text, metric_type="accuracy", metric_name=how, metric_value=accuracy))
    written.data.model_name, written.data.eval_results = card.parent.name, results
    written.save(card)


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
        bf16=is_fast_on_cpu(torch.bfloat16),
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
