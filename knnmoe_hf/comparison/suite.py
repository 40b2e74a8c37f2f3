"""A task's test items: their requests, made once for all methods, and their scores, which the harness computes."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval import evaluator
from lm_eval.api.instance import Instance

from knnmoe_hf.comparison.model import MethodLM, item_key, request_keys
from knnmoe_hf.tasks import Benchmark, prompt_of
from knnmoe_hf.tasks.items import Prompt
from knnmoe_hf.tasks.loading import without_warnings

RIGHT_CHOICE = "loglikelihood"
"""The metric that this package adds: the log-likelihood of the right choice."""
_COUNTED = 20  # items whose tokens are counted for an estimate


@dataclass(frozen=True)
class Scored:
    """
    The scores of a method's responses, item by item.

    Attributes:
        items: names of the items.
        groups: the group of each.
        metrics: `{metric: value of each item}`, as the harness computes them, and the log-likelihood of the right
            choice (`RIGHT_CHOICE`) where there are choices.
    """

    items: list[str]
    groups: list[str]
    metrics: dict[str, list[float]]


class Suite:
    """
    The test items of one task, or of a group of tasks such as `mmlu`.

    Args:
        benchmark: loaded.
        lm: whose tokenizer and chat template make the prompts.
        limit: items of each task of the harness at most; None takes all.
        unsafe: whether code that the model writes may be run.
    """

    def __init__(self, benchmark: Benchmark, lm: MethodLM, limit: int | None = None, unsafe: bool = False):
        self.benchmark, self.unsafe, self._limit = benchmark, unsafe, limit
        template = lm.apply_chat_template if benchmark.apply_chat_template else None
        self.requests: list[Instance] = []
        with _hidden_bars():
            for task in benchmark.tasks.values():
                task.set_fewshot_seed(seed=benchmark.fewshot_seed)
                task.build_all_requests(
                    limit=limit,
                    system_instruction=benchmark.system_instruction,
                    apply_chat_template=bool(benchmark.apply_chat_template),
                    fewshot_as_multiturn=benchmark.fewshot_as_multiturn,
                    chat_template=template,
                    tokenizer_name=lm.tokenizer_name if benchmark.apply_chat_template else "",
                )
                self.requests += [request for request in task.instances for _ in range(request.repeats or 1)]
        self._groups = {item_key(r): self.prompt_of(r, ()).group for r in self.requests}

    @property
    def items(self) -> list[str]:
        """Names of the items."""
        return list(self._groups)

    @property
    def keys(self) -> dict[str, list[str]]:
        """`{item: keys of its requests}`, as `MethodLM` records them."""
        found: dict[str, list[str]] = {}
        for kind in self.by_type().values():
            for key, request in zip(request_keys(kind), kind):
                found.setdefault(item_key(request), []).append(key)
        return found

    def by_type(self) -> dict[str, list[Instance]]:
        """The requests by the method of the harness's model that answers them."""
        found: dict[str, list[Instance]] = {}
        for request in self.requests:
            found.setdefault(request.request_type, []).append(request)
        return found

    def token_counts(self, lm: MethodLM) -> list[list[int]]:
        """For some of the items, the lengths of the sequences that a pass reads to score it, each once."""
        chosen = set(self.items[:: max(1, len(self.items) // _COUNTED)])
        found: dict[str, set[tuple[int, ...]]] = {}
        for request in self.requests:
            if item_key(request) in chosen:
                found.setdefault(item_key(request), set()).add(_read(lm, request))
        return [[len(sequence) for sequence in sequences] for sequences in found.values()]

    def prompt_of(self, request: Instance, tokens: tuple[int, ...]) -> Prompt:
        """The prompt of a test item's request, whose tokens are these."""
        return prompt_of(self.benchmark.tasks[request.task_name], request.doc_id, request.doc, tokens)

    def answer(self, lm: MethodLM) -> None:
        """Has a model answer the requests whose responses are not on record yet."""
        for kind, requests in self.by_type().items():
            getattr(lm, kind)(requests)

    def score(self, lm: MethodLM) -> Scored:
        """
        The harness's own scores of a model's responses, which are all on record.

        Raises:
            ValueError: for a task that runs code, without consent.
        """
        benchmark = self.benchmark
        for task in benchmark.tasks.values():
            task.set_fewshot_seed(seed=benchmark.fewshot_seed)
        with _hidden_bars():
            found = evaluator.evaluate(
                lm,
                task_dict=benchmark.loaded,
                limit=self._limit,
                bootstrap_iters=0,
                log_samples=True,
                system_instruction=benchmark.system_instruction,
                apply_chat_template=benchmark.apply_chat_template,
                fewshot_as_multiturn=benchmark.fewshot_as_multiturn,
                confirm_run_unsafe_code=self.unsafe,
            )
        return self._scored(found["samples"])

    def _scored(self, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Scored:
        values: dict[str, dict[str, float]] = {}
        for name, of_task in samples.items():
            for sample in of_task:
                found = values.setdefault(f"{name}/{sample['doc_id']}", {})
                suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
                for metric in sample["metrics"]:
                    if isinstance(sample[metric], (int, float)):
                        found[f"{metric}{suffix}"] = float(sample[metric])
                if self.benchmark.tasks[name].OUTPUT_TYPE == "multiple_choice":
                    found |= _right_choice(self.benchmark.tasks[name], sample)
        shared = [m for m in next(iter(values.values())) if all(m in found for found in values.values())]
        metrics = {metric: [found[metric] for found in values.values()] for metric in shared}
        return Scored(list(values), [self._groups[item] for item in values], metrics)


def _read(lm: MethodLM, request: Instance) -> tuple[int, ...]:
    """The tokens that a pass reads for a request. Requests for single tokens after the same text share one pass."""
    if request.request_type != "loglikelihood" or not request.args[0]:
        return tuple(lm.tok_encode("".join(part for part in request.args if isinstance(part, str))))
    context, continuation = lm._encode_pair(*request.args)
    return (*context, *continuation[:-1])


def main_metric(metrics: Sequence[str]) -> str | None:
    """The metric that a task is judged by: raw accuracy if it is there."""
    return next((name for name in ("acc", "exact_match", *metrics) if name in metrics), None)


def _right_choice(task, sample: Mapping[str, Any]) -> dict[str, float]:
    target = sample["target"]
    if isinstance(target, str) and not task.multiple_input:
        choices = list(task.doc_to_choice(sample["doc"]))
        target = choices.index(target) if target in choices else None
    if type(target) is not int or not 0 <= target < len(sample["filtered_resps"]):
        return {}
    return {RIGHT_CHOICE: float(sample["filtered_resps"][target][0])}


@contextlib.contextmanager
def _hidden_bars() -> Iterator[None]:
    """Inside this context the harness's progress bars are hidden: this package shows its own."""
    with without_warnings("lm_eval"), contextlib.redirect_stderr(io.StringIO()):
        yield
