"""Explain an answer: which reference tokens the memory recalled for each token, and which experts they moved it to.

python examples/explain_an_answer.py                                        # the shipped lab model, offline
python examples/explain_an_answer.py allenai/OLMoE-1B-7B-0924               # your model
python examples/explain_an_answer.py allenai/OLMoE-1B-7B-0924 my-memory     # with a memory that you have already
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnmoe_hf import (
    KNNMoEConfig,
    KNNMoETrainer,
    KNNMoETrainingArguments,
    RoutingMemory,
    attach_memory,
    trace_routing,
)
from knnmoe_hf.explain.page import to_html
from knnmoe_hf.explain.trace import RoutingTrace
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.lab.corpus import documents, windows

PROMPT = "The statement is executed when"


def built(model, tokenizer, rows: int = 48) -> RoutingMemory:
    """A small memory of the documentation of Python's syntax."""
    references = [
        {"input_ids": ids, "labels": ids} for ids in windows(documents("topics", "reference"), tokenizer, 128, rows)
    ]
    trainer = KNNMoETrainer(
        model=model,
        args=KNNMoETrainingArguments(output_dir="explained-memory", report_to="none"),
        config=KNNMoEConfig(confidence="context", recall="both"),  # needs no calibration, so that this is quick
        train_dataset=references,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return trainer.memory


def main(base: str = str(LAB_MODELS["olmoe"]), memory: str | None = None, page: str = "answer.html") -> RoutingTrace:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if memory is None:
        built(model, tokenizer)  # the trainer attaches it
    else:
        attach_memory(model, RoutingMemory.from_pretrained(memory))

    prompt = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    with trace_routing(model) as trace:
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    print(tokenizer.decode(answer[0]))

    layer = max(trace.layers)  # its neighbours also vote for the next token
    for place in range(prompt.input_ids.shape[1] - 1, len(trace)):
        token, nearest = tokenizer.decode(trace.token_ids[place]), trace.neighbors(place, layer, tokenizer)[0]
        said = nearest.reference
        where = f"{said.before[-30:]}[{said.token}]{said.after[:20]}" if said.token is not None else f"row {said.row}"
        print(f"{token!r:14} confidence {trace.layers[layer].confidence[place]:.2f}, recalled {where!r}")

    Path(page).write_text(to_html(trace, "Why the model said this", tokenizer), encoding="utf-8")
    print(f"{page} shows every layer, neighbour and expert: open it in a browser")
    return trace


if __name__ == "__main__":
    main(*sys.argv[1:])
