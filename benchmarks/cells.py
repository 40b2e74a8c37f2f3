"""Measuring: one cell of the bench is a lab model, a kind of reference text and the seed that draws the references."""

import dataclasses
import hashlib
import time
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.competitors import KEEPS_WEIGHTS, RATES, tuned
from benchmarks.memories import Memories
from benchmarks.results import Table, cell_path, lab_path, rounded, scores_of, versions
from benchmarks.settings import COUNTS, REFERENCE_COUNTS, SEEDS, Setting, at_rate
from benchmarks.texts import KINDS, OFF_STEP, REFERENCES, WINDOW, LabTexts, token_digest
from knnmoe_hf import attach_memory, detach_memory
from knnmoe_hf.evaluation import Scores, paired_bootstrap, score
from knnmoe_hf.lab import LAB_MODELS

BATCH = 8


class Lab:
    """A lab model, its texts, and what the frozen model makes of the test windows (measured once, and kept)."""

    def __init__(self, name: str, folder: Path, test_windows: int):
        self.name, self.folder = name, folder
        source = LAB_MODELS[name]
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.texts = LabTexts(self.tokenizer, test_windows)
        weights = hashlib.sha256(b"".join(p.read_bytes() for p in sorted(source.glob("*.safetensors")))).hexdigest()
        self.read = {kind: token_digest(self.texts.test(kind)) for kind in KINDS} | {"model": weights[:16]}
        self.frozen = {kind: scores_of(stored) for kind, stored in self._frozen()["scores"].items()}

    def _frozen(self) -> dict:
        table, wanted = Table(lab_path(self.folder, self.name)), {"read": self.read}
        found = table.get("frozen", wanted)
        if found is not None:
            return found
        scores = {kind: score(self.model, self.texts.test(kind), BATCH) for kind in KINDS}
        entry = {"versions": versions(), "scores": {kind: rounded(found) for kind, found in scores.items()}}
        return table.put("frozen", wanted, entry)


class Cell:
    """
    Args:
        lab: model and texts.
        kind: of the references, and of the in-domain test.
        seed: draws the references, orders the batches of fine-tuning, starts a LoRA.
        most: references of the largest setting that will be asked for, in windows.
        limit: no setting gets more references than this; None for as many as it says.
        fresh: measure again what an earlier run has measured.
    """

    def __init__(self, lab: Lab, kind: str, seed: int, most: int, limit: int | None = None, fresh: bool = False):
        self.lab, self.kind, self.seed, self.limit, self.fresh = lab, kind, seed, limit, fresh
        self.table = Table(cell_path(lab.folder, lab.name, kind, seed))
        self.tests = lab.texts.judged_on(kind)
        self.base = {text: _every(lab.frozen[text], 1 if text == kind else OFF_STEP) for text in self.tests}
        self.references = lab.texts.references(kind, seed, min(most, limit or most))
        self.memories = Memories(lab.model, lab.tokenizer, self.references, seed)
        self._measured: set[str] = set()  # in this run

    def is_another(self, setting: Setting) -> bool:
        """False if one of fewer references is given all that there are already."""
        available = len(self.references)
        fewer = (count for count in (*COUNTS, REFERENCES) if count < setting.references)
        return setting.group != REFERENCE_COUNTS or all(count < available for count in fewer)

    def has(self, setting: Setting) -> bool:
        """Whether it needs not be measured."""
        known = self.table.get(setting.name, self._wanted(setting)) is not None
        return known and (not self.fresh or setting.name in self._measured)

    def entry(self, setting: Setting) -> dict:
        """What was measured, now or before."""
        wanted = self._wanted(setting)
        if self.has(setting):
            return self.table.get(setting.name, wanted)
        found = self._measure(setting) | {"group": setting.group}
        self._measured.add(setting.name)
        return self.table.put(setting.name, wanted, found)

    def _given(self, setting: Setting) -> list[dict]:
        return self.references[: setting.references]

    def _wanted(self, setting: Setting) -> dict:
        read = self.lab.read | {"references": token_digest(self._given(setting))}
        return {"options": setting.options(), "read": read}

    def _measure(self, setting: Setting) -> dict:
        if setting.competitor in RATES and setting.rate is None:
            rate = self._best_rate(setting.competitor)
            if self.seed == SEEDS[0] and setting.references == REFERENCES:
                return self.entry(at_rate(setting.competitor, rate))  # which it is
            setting = dataclasses.replace(setting, rate=rate)
        about = {"versions": versions(), "reference_tokens": WINDOW * len(self._given(setting))}
        return about | (self._memory(setting) if setting.competitor is None else self._competitor(setting))

    def _memory(self, setting: Setting) -> dict:
        memory, about = self.memories.make(setting)
        attach_memory(self.lab.model, memory)
        try:
            return {"keeps": True} | about | self._scored(self.lab.model)
        finally:
            detach_memory(self.lab.model)

    def _competitor(self, setting: Setting) -> dict:
        name = setting.competitor
        found = tuned(name, self.lab.model, self._given(setting), self.seed, setting.rate)
        about = {"keeps": name in KEEPS_WEIGHTS, "bytes": found.nbytes, "build_seconds": round(found.seconds, 2)}
        if name in RATES:
            about["rate"] = setting.rate
            about["validation_nll"] = score(found.model, self.lab.texts.validation(self.kind), BATCH).mean_nll
        return about | self._scored(found.model)

    def _scored(self, model: nn.Module) -> dict:
        began = time.process_time()
        scores = {text: score(model, rows, BATCH) for text, rows in self.tests.items()}
        changes = {
            text: {metric: _triple(paired_bootstrap(self.base[text], found, metric)) for metric in ("nll", "hits")}
            for text, found in scores.items()
        }
        return {
            "evaluate_seconds": round(time.process_time() - began, 2),
            "changes": changes,
            "scores": {text: rounded(found) for text, found in scores.items()},
        }

    def _best_rate(self, competitor: str) -> float:
        """The rate with the least NLL on validation text, by the first seed's references."""
        first = self
        if self.seed != SEEDS[0]:
            first = Cell(self.lab, self.kind, SEEDS[0], REFERENCES, self.limit)
        tried = {rate: first.entry(at_rate(competitor, rate))["validation_nll"] for rate in RATES[competitor]}
        return min(tried, key=tried.get)


def _every(scores: Scores, step: int) -> Scores:
    return Scores(scores.nll[::step], scores.hits[::step], scores.tokens[::step])


def _triple(change) -> list[float]:
    return [round(number, 5) for number in (change.mean, change.low, change.high)]
