"""A small multiple-choice task of the harness, a tiny model, and methods that are simple enough to check by hand."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from lm_eval.tasks import TaskManager

from knnmoe_hf.baselines.base import Method, overriding, rerouted
from knnmoe_hf.comparison.plan import Settings
from knnmoe_hf.comparison.planning import make_plan
from knnmoe_hf.comparison.run import Comparison
from knnmoe_hf.comparison.setup import claimed
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.tasks.items import Prompt
from knnmoe_hf.tasks.loading import Benchmark, set_fewshot
from tests.support.models import tiny_model
from tests.support.tokenizers import byte_tokenizer

WORDS = "a gate routes every token to a few experts that were trained on other text than this one".split()


def write_tasks(folder: Path) -> None:
    """Writes the tasks `small` and `other`."""
    write_task(folder)
    write_task(folder, 6, name="other")


def write_task(folder: Path, items: int = 12, kind: str = "multiple_choice", name: str = "small") -> str:
    """Writes a task of invented items into a folder, and returns its name."""
    rows = []
    for i in range(items):
        words = [WORDS[(i * k + k * k) % len(WORDS)] for k in range(3, 6 + i % 4)]
        choices = [" ".join(WORDS[(i + c * 3 + k) % len(WORDS)] for k in range(1 + (i + c) % 3)) for c in range(3)]
        rows.append({"question": " ".join(words), "choices": choices, "answer": i % 3, "split": "test"})
    for split in ("test", "train"):
        # so different that no reference looks like a test item
        mark = "" if split == "test" else " ".join(reversed(WORDS))
        lines = [json.dumps(row | {"question": f"{name} {row['question']} {mark}"}) for row in rows]
        (folder / f"{name}-{split}.jsonl").write_text("\n".join(lines))
    files = {split: str(folder / f"{name}-{split}.jsonl") for split in ("test", "train")}
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "training_split": "train",
        "output_type": kind,
        "doc_to_text": "Question: {{question}}\nAnswer:",
    }
    if kind == "multiple_choice":
        task |= {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
        task["metric_list"] = [{"metric": metric} for metric in ("acc", "acc_norm")]
    elif kind == "generate_until":
        task |= {"doc_to_target": "{{choices[0]}}", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}}
        task["metric_list"] = [{"metric": "exact_match"}]
    else:
        task |= {"doc_to_text": "", "doc_to_target": "{{question}}", "metric_list": [{"metric": "word_perplexity"}]}
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return name


def load(folder: Path, name: str = "small") -> dict:
    """What the harness loads of a task that `write_task` wrote."""
    return TaskManager(include_path=str(folder), include_defaults=False).load([name])


def benchmark(folder: Path, name: str = "small") -> Benchmark:
    """A task that `write_task` wrote, as a comparison takes it."""
    loaded = load(folder, name)
    for task in loaded["tasks"].values():
        set_fewshot(task, None)
    return Benchmark(name, loaded)


def compared(
    folder: Path, output: Path, methods: list, tasks: list | None = None, window: int = 256, **settings
) -> dict:
    """
    Results of a comparison on the task `small` with 8 references, its off-domain task being `other`.

    Args:
        window: tokens that the model can read.
    """
    tasks = tasks or [{"name": "small", "off_tasks": ["other"]}]
    plan = make_plan("tiny", methods, tasks, Settings(**{"references": 8, "batch_size": 3} | settings))
    benchmarks = {name: benchmark(folder, name) for task in plan.tasks for name in (task.name, *task.off_tasks)}
    model = tiny_model("olmoe", vocab_size=260, max_position_embeddings=window)
    with claimed(output, plan):
        return Comparison(plan, benchmarks, model, byte_tokenizer(), output).run()


def timeless(results: dict) -> dict:
    """Results without what is measured with a clock."""
    clock = ("seconds", "times_frozen", "timed_items", "fit_seconds")
    found = json.loads(json.dumps(results))
    for row in found["results"]:
        row["cost"] = {name: value for name, value in (row["cost"] or {}).items() if name not in clock}
    return found


def requests_of(folder: Path, name: str = "small", limit: int | None = None) -> list:
    """The requests of a task without worked examples."""
    (task,) = load(folder, name)["tasks"].values()
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=limit)
    return list(task.instances)


@dataclass
class Shift(Method):
    """Adds `amount` to the logits of expert 0 in every layer."""

    amount: float = 3.0
    source: ClassVar[str] = "a test"

    def fit(self, model, references, seed: int = 0, tokenizer=None) -> None:
        """Learns nothing."""

    def bias(self, prompt: Prompt | None) -> float:
        """What is added."""
        return self.amount

    @contextmanager
    def apply(self, model, prompt: Prompt | None = None) -> Iterator:
        """The model with shifted logits."""
        overrides = {}
        for gate in find_gates(model):
            shift = torch.zeros(gate.num_experts)
            shift[0] = self.bias(prompt)

            def override(x, output, tokens, gate=gate, shift=shift):
                return rerouted(gate, output, output[0] + shift)

            overrides[gate.layer] = override
        with overriding(model, overrides):
            yield model


@dataclass
class ByPrompt(Shift):
    """Adds more for longer prompts, and remembers the prompts that it was given."""

    per_item: ClassVar[bool] = True

    def __post_init__(self):
        self.prompts: list[Prompt] = []

    def bias(self, prompt: Prompt | None) -> float:
        """What is added."""
        self.prompts.append(prompt)
        return self.amount * (len(prompt.tokens) % 5)


@dataclass
class Prefix(Shift):
    """Puts `count` tokens before each prompt and leaves the model as it is."""

    count: int = 5
    acts_on: ClassVar[tuple[str, ...]] = ("prompt",)

    @contextmanager
    def apply(self, model, prompt: Prompt | None = None) -> Iterator:
        """The model as it is."""
        yield model

    def prepend(self, prompt: Prompt) -> tuple[int, ...]:
        """Tokens 65, 66, ..."""
        return tuple(range(65, 65 + self.count))
