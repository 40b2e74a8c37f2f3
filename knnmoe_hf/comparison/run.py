"""A comparison from a plan to `results.json` and its report; what an earlier run has done is not done again."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import lm_eval
import torch
import transformers
from transformers import PreTrainedModel

from knnmoe_hf.baselines.base import Method
from knnmoe_hf.baselines.registry import make_method
from knnmoe_hf.comparison import estimate
from knnmoe_hf.comparison.effect import Effect, effect_on_prompts, effect_on_responses, effect_on_routing
from knnmoe_hf.comparison.fits import fit_or_load
from knnmoe_hf.comparison.model import MethodLM
from knnmoe_hf.comparison.plan import FROZEN, ComparisonPlan, MethodPlan, TaskPlan, digest
from knnmoe_hf.comparison.record import Record
from knnmoe_hf.comparison.report import RESULTS, write_report
from knnmoe_hf.comparison.results import RESAMPLES, break_row, cost_of, fail_row, fill_row, new_row
from knnmoe_hf.comparison.setup import check_consent, make_methods, read_references
from knnmoe_hf.comparison.suite import Scored, Suite, main_metric
from knnmoe_hf.errors import is_of_interrupt
from knnmoe_hf.files import write_json
from knnmoe_hf.models.fingerprint import fingerprint
from knnmoe_hf.models.gates import find_gates
from knnmoe_hf.tasks import Benchmark
from knnmoe_hf.version import __version__

logger = logging.getLogger(__name__)


class Comparison:
    """
    A comparison that is carried out.

    Args:
        plan: what is compared.
        benchmarks: its tasks, as `load_benchmarks` returns them.
        model: frozen, in eval mode.
        tokenizer: the model's.
        folder: for everything that is kept: responses, fits, results and report; `claimed` for this plan.
        progress: whether progress bars are shown.
        say: called with a line for the user before each method.
        unsafe: whether code that the model writes may be run.

    Raises:
        ValueError: for an unknown method or option, if a task has no references, or runs code without consent.
    """

    def __init__(
        self,
        plan: ComparisonPlan,
        benchmarks: Mapping[str, Benchmark],
        model: PreTrainedModel,
        tokenizer,
        folder: Path,
        progress: bool = False,
        say: Callable[[str], None] = logger.info,
        unsafe: bool = False,
    ):
        self.plan, self.model, self.tokenizer, self.folder = plan, model, tokenizer, folder
        self._progress, self._say = progress, say
        self._unfitted = make_methods(plan)
        check_consent(benchmarks, unsafe)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.references = {
            task.name: read_references(plan, benchmarks, task, tokenizer, longest) for task in plan.tasks
        }
        lm = MethodLM(model, tokenizer)
        self.suites = {name: Suite(one, lm, self._limit_of(name), unsafe) for name, one in benchmarks.items()}
        self._model_digest = digest(fingerprint(find_gates(model)), str(model.dtype), plan.model)
        self._scores: dict[tuple[str, str, str], Scored] = {}
        self.results = self._nothing_yet()
        self._described = {name: {} for name in self.suites} | {one["name"]: one for one in self.results["tasks"]}

    def seconds(self) -> dict[str, float]:
        """About how long each method takes, by its passes and one forward of the model."""
        found = dict.fromkeys(self._unfitted, 0.0)
        for task in self.plan.tasks:
            suites = [self.suites[name] for name in (task.name, *task.off_tasks)]
            lengths = [suite.token_counts(MethodLM(self.model, self.tokenizer)) for suite in suites]
            token = estimate.seconds_of_token(self.model, [one for some in lengths for item in some for one in item])
            items = sum(len(suite.items) for suite in suites)
            each = [sum(map(sum, some)) / len(some) * len(suite.items) for some, suite in zip(lengths, suites)]
            references = self.references[task.name].items
            own = estimate.seconds_of_methods(self._unfitted, token, items, sum(each) / items, references)
            found = {label: found[label] + own[label] for label in found}
        return found

    def run(self) -> dict[str, Any]:
        """
        Fits and scores everything that is not on record.

        Returns:
            The content of `results.json`.
        """
        for task in self.plan.tasks:
            for planned in self.plan.methods:
                self._say(f"{task.name}: {planned.label}")
                self._compare(task, planned)
                self._save()
        self.results["complete"] = True
        self._save()
        return self.results

    def _compare(self, task: TaskPlan, planned: MethodPlan) -> None:
        """One method on a task and its off-domain tasks; an error of the method is written into its rows."""
        own = (task.name, planned.label)
        rows = {row["task"]: row for row in self.results["results"] if (row["fitted_on"], row["method"]) == own}
        try:
            self._run_method(task, planned, rows)
        except Exception as error:
            if planned.method == FROZEN or is_of_interrupt(error):
                raise
            logger.info("%s failed on %s", planned.label, task.name, exc_info=True)
            for row in rows.values():
                fail_row(row, error)

    def _run_method(self, task: TaskPlan, planned: MethodPlan, rows: dict[str, dict[str, Any]]) -> None:
        method, seed = make_method(planned.method, **planned.options), self.plan.settings.seed
        references = self.references[task.name]
        of = digest(self._model_digest, references.digest, seed)
        place = self.folder / "fits" / task.name
        label = f"fitting {planned.label}" if self._progress else None
        fit = fit_or_load(method, self.model, references.items, self.tokenizer, seed, place, of, label)
        of = digest(of if planned.method != FROZEN else self._model_digest, planned.method, asdict(method))
        effect = self._effect_on_routing(task, planned, method, of)
        if effect is not None and effect.is_none and len(method.acts_on) > 1:
            effect = None  # its responses decide
        for name, row in rows.items():
            if effect is not None and effect.is_none:
                break_row(row, effect)
                continue
            suite, record = self.suites[name], self._record(task.name, planned.label, name, of)
            lm = self._lm(method, suite, record, f"{planned.label} on {name}")
            suite.answer(lm)
            if effect is None and planned.method != FROZEN:  # the task that it was fitted on comes first
                effect = self._effect_on_answers(method, name, record)
                if effect.is_none:
                    break_row(row, effect)
                    continue
            scored = self._scores[task.name, planned.label, name] = suite.score(lm)
            main = main_metric(scored.metrics)
            self._described[name] |= {"metrics": list(scored.metrics), "metric": main}
            others = {
                label: found
                for (fitted, label, where), found in self._scores.items()
                if (fitted, where) == (task.name, name) and label != planned.label and self._is_compared_with(label)
            }
            cost = cost_of(record, suite.keys, fit, method.nbytes)
            fill_row(row, scored, others, main, cost, effect)

    def _is_compared_with(self, label: str) -> bool:
        planned = next(one for one in self.plan.methods if one.label == label)
        return planned.method == FROZEN or planned.is_memory

    def _effect_on_routing(self, task: TaskPlan, planned: MethodPlan, method: Method, of: str) -> Effect | None:
        """The effect of a method that acts on the routing, kept for the next run; None for all others."""
        if planned.method == FROZEN or "routing" not in method.acts_on:
            return None
        path = self.folder / "effects" / task.name / f"{planned.label}.json"
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.pop("of") == of:
                return Effect(**kept)
        suite = self.suites[task.name]
        effect = effect_on_routing(self.model, self.tokenizer, method, suite.requests, suite.prompt_of)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(effect) | {"of": of})
        return effect

    def _effect_on_answers(self, method: Method, task: str, record: Record) -> Effect:
        """The effect of a method whose routing does not show one; all its responses are on record."""
        if "prompt" in method.acts_on:
            return effect_on_prompts(record, self.suites[task].keys)
        return effect_on_responses(self._frozen_record(task), record, self.suites[task].keys, self.model.dtype)

    def _lm(self, method: Method, suite: Suite, record: Record, label: str) -> MethodLM:
        return MethodLM(
            self.model,
            self.tokenizer,
            method,
            suite.prompt_of,
            record,
            self.plan.settings.batch_size,
            progress=label if self._progress else None,
            timed=True,
            seed=self.plan.settings.seed,
        )

    def _record(self, fitted_on: str, label: str, task: str, of: str) -> Record:
        fitted_on = task if label == self.plan.methods[0].label else fitted_on  # the frozen model is never fitted
        return Record(self.folder / "responses" / label / fitted_on / f"{task}.jsonl", of)

    def _limit_of(self, name: str) -> int | None:
        settings, is_own = self.plan.settings, any(task.name == name for task in self.plan.tasks)
        return settings.limit if is_own or settings.off_limit is None else settings.off_limit

    def _frozen_record(self, task: str) -> Record:
        frozen = self.plan.methods[0]
        method = make_method(frozen.method, **frozen.options)
        return self._record(task, frozen.label, task, digest(self._model_digest, frozen.method, asdict(method)))

    def _save(self) -> None:
        write_json(self.folder / RESULTS, self.results)
        write_report(self.folder)

    def _nothing_yet(self) -> dict[str, Any]:
        """The results before any method has run."""
        gates, plan = find_gates(self.model), self.plan
        return {
            "written_by": f"knnmoe compare {__version__}",
            "complete": False,
            "name": plan.name,
            "model": {
                "name": plan.model,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "layers": len(gates),
                "experts": gates[0].num_experts,
                "top_k": gates[0].top_k,
                "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            },
            "settings": asdict(plan.settings) | {"resamples": RESAMPLES},
            "machine": {
                "device": str(next(self.model.parameters()).device),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "lm_eval": lm_eval.__version__,
            },
            "methods": [self._describe(one) for one in plan.methods],
            "tasks": [self._describe_task(one) for one in plan.tasks],
            "results": [
                new_row(task.name, name, method.label, len(self.suites[name].items))
                for task in plan.tasks
                for method in plan.methods
                for name in (task.name, *task.off_tasks)
            ],
            "published": [asdict(one) for one in plan.published],
        }

    def _describe(self, planned: MethodPlan) -> dict[str, Any]:
        method = self._unfitted[planned.label]
        names = ("source", "keeps_weights", "per_item", "by_batch")
        ours = [one.name for one in fields(method) if one.metadata.get("ours")]
        told = {"options": asdict(method), "ours": ours, "acts_on": " and ".join(method.acts_on)}
        return asdict(planned) | told | {name: getattr(method, name) for name in names}

    def _describe_task(self, task: TaskPlan) -> dict[str, Any]:
        references = self.references[task.name]
        read = {"count": len(references.items), "tokens": references.tokens, "digest": references.digest}
        read |= {"removed": references.removed, "removed_text": references.removed_text}
        own = {"name": task.name, "off": list(task.off_tasks), "note": task.note, "metrics": [], "metric": None}
        return own | {"items": len(self.suites[task.name].items), "references": read}
