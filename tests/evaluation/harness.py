"""What the tests of the harness share: a tiny model and a memory in folders, and tasks of invented items."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from lm_eval.api.registry import get_model
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from tests.conftest import random_memory, tiny_model
from tests.support.tokenizers import PLAIN, byte_tokenizer

NAMES = ("Mira", "Tomo", "Ada", "Ines", "Oskar", "Lena")
THINGS = ("a red kite", "an old lamp", "two boxes", "the green key", "some rope", "a map of it all")
CHOICES = """
task: which_thing
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING = """
task: go_on
output_type: generate_until
doc_to_text: question
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def save_models(folder: Path) -> tuple[str, str]:
    """Folders of a tiny OLMoE and of a memory with a visible effect that names it."""
    model = tiny_model("olmoe", vocab_size=257, max_position_embeddings=512)
    model.save_pretrained(folder / "base")
    tokenizer = byte_tokenizer(PLAIN)
    tokenizer.save_pretrained(folder / "base")
    memory = random_memory(model, rows=60, gamma=0.02)
    memory.config.base_model_name_or_path = str(folder / "base")
    replace(memory, tokenizer=tokenizer).save_pretrained(folder / "memory")
    return str(folder / "base"), str(folder / "memory")


def save_tasks(folder: Path) -> TaskManager:
    """Two tasks of twelve items, `which_thing` and `go_on`; the first two serve as worked examples too."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(12):
        first, second = torch.randperm(6, generator=generator)[:2].tolist()
        question = f"{NAMES[i % 6]} has {THINGS[first]} and {'x' * (3 * i % 7)} {THINGS[second]}. What is first?"
        rows.append({"question": question, "choices": [THINGS[first], THINGS[second], "nothing"], "answer": i % 3})
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "shots.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    files = f"{{test: {folder / 'items.jsonl'}, validation: {folder / 'shots.jsonl'}}}"
    data = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {files}}}\ntest_split: test\nfewshot_split: validation\n"
    )
    for name, text in (("choices", CHOICES), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(text + data)
    return TaskManager(include_path=str(folder), include_defaults=False)


def samples(
    tasks: TaskManager, model: str, arguments: dict, task: str = "which_thing", batch_size: int = 1, **settings
) -> dict:
    """
    The harness's record of each item, by the item's hash.

    As `simple_evaluate`, which takes seconds to describe the machine.

    Args:
        model, arguments: the model type, and its arguments.
        settings: of `evaluate`.
    """
    lm = get_model(model)(**arguments, batch_size=batch_size, device="cpu")
    loaded = tasks.load([task])
    for one in loaded["tasks"].values():
        one.set_config(key="num_fewshot", value=settings.pop("num_fewshot", 0))
        one.set_fewshot_seed(seed=1234)
    found = evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0, **settings)
    return {sample["doc_hash"]: sample for sample in found["samples"][task]}


def answers(found: dict) -> dict:
    """Of `samples`, what was asked and answered."""
    return {key: (sample["prompt_hash"], sample["filtered_resps"]) for key, sample in found.items()}
