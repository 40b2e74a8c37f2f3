"""Gain and harm of every setting of a memory and of its competitors, on the same reference and test windows.

    python -m benchmarks.effect.run                                                  # everything: hours on two cores
    python -m benchmarks.effect.run --labs olmoe --kinds topics --seeds 0 --settings "memory, default" LoRA
    python -m benchmarks.effect.report                                               # the page from what was measured

What is measured where is data in `benchmarks/effect/settings.py`. A cell is a lab model, a kind of reference text and
the seed that draws the references; its file `results/effect/<lab>-<kind>-<seed>.json` gets a line for each setting as
soon as it is measured, and a second run skips what is there, so that a run may be interrupted. Settings that differ
only in how rows are stored or used share a build, and the best learning rate of a competitor is one of those that are
measured. Constants are the library's defaults, which were chosen on validation text; the test windows are read here
alone.

Some text comes from installed packages, so another machine may have other windows. With `--keep`, what was measured on
these stays in the file as an earlier block, beside its own scores of the frozen model; the pages mark it.
"""

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.effect.competitors import KEEPS_WEIGHTS, RATES, tuned
from benchmarks.effect.figures import rounded, scores_of
from benchmarks.effect.memories import Memories
from benchmarks.effect.report import write_report
from benchmarks.effect.settings import GROUPS, LABS, SEEDS_OF, Setting, grid, planned
from benchmarks.pages import DTYPES, RESULTS, add_dtype, commit, parser, versions
from benchmarks.texts import IN_DOMAIN, TEST, WINDOW, LabTexts, token_digest
from knnmoe_hf import attach_memory, detach_memory
from knnmoe_hf.evaluation import Change, Scores, paired_bootstrap, score
from knnmoe_hf.lab import LAB_MODELS

BATCH = 8


class Results:
    """
    The file of one cell, whole at any time: `{"inputs", "commit", "base": {text: scores}, "settings": {name: entry}}`
    and `"earlier"`, a list of such blocks that were measured with other inputs.

    Args:
        path: of the file.
        inputs: digest of the model and of all text.
        base: computes the scores of the frozen model by kind of test text.
        fresh: replace a file that was measured with other inputs, which is refused otherwise.
        keep: keep what it holds as an earlier block instead.
    """

    def __init__(self, path: Path, inputs: str, base, fresh: bool, keep: bool):
        self.path = path
        found = json.loads(path.read_text()) if path.exists() else None
        other = found is not None and found["inputs"] != inputs
        if other and not (fresh or keep):
            raise SystemExit(
                f"{path} was measured with another model or on other text, at commit {found['commit']}: use another "
                "folder with --results, --keep to measure beside it, or --fresh to replace it."
            )
        if found is None or other:
            earlier = [*found.pop("earlier", []), found] if other and keep else []
            scores = {text: rounded(measured) for text, measured in base().items()}
            found = {"inputs": inputs, "commit": commit(), "base": scores, "settings": {}, "earlier": earlier}
        self.content = found

    @property
    def base(self) -> dict[str, Scores]:
        """By kind of text."""
        return {text: scores_of(stored) for text, stored in self.content["base"].items()}

    def has(self, setting: Setting) -> bool:
        """Whether the setting was measured with the options that it has now."""
        entry = self.content["settings"].get(setting.name)
        return entry is not None and entry["options"] == setting.options()

    def put(self, setting: Setting, entry: dict) -> None:
        """Writes one entry."""
        made = {"group": setting.group, "commit": commit(), "versions": versions(), "options": setting.options()}
        self.content["settings"][setting.name] = made | entry
        earlier = ",\n".join(map(_text, self.content.get("earlier", [])))
        text = _text({name: value for name, value in self.content.items() if name != "earlier"})
        if earlier:
            text = f'{text.removesuffix("}")},\n"earlier": [\n{earlier}]}}'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}")
        temporary.write_text(text + "\n")
        os.replace(temporary, self.path)


def _text(block: dict) -> str:
    """A block as JSON, a line for each setting."""
    head = (f"{json.dumps(key)}: {json.dumps(block[key])}" for key in ("inputs", "commit", "base"))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(one)}" for name, one in block["settings"].items())
    return "{\n" + ",\n".join(head) + ',\n"settings": {\n' + lines + "\n}}"


class Cell:
    """
    Args:
        lab: name of the lab model, one of `LAB_MODELS`.
        kind: of the references, and of the in-domain test.
        seed: draws the references, orders the batches of fine-tuning, initialises a LoRA.
        options: of the command line.
    """

    def __init__(self, lab: str, kind: str, seed: int, options):
        source, dtype = LAB_MODELS[lab], DTYPES[options.dtype]
        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.kind, self.seed = kind, seed
        self.texts = LabTexts(self.tokenizer, options.test_windows)
        self.tests = self.texts.judged_on(kind)
        self.references = self.texts.references(kind, seed, options.references)
        weights = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(source.glob("*.safetensors"))))
        read = [token_digest(rows) for rows in (self.references, *self.tests.values())]
        inputs = hashlib.sha256(repr((weights.hexdigest(), options.dtype, read)).encode()).hexdigest()[:16]
        path = options.results / "effect" / f"{lab}-{kind}-{seed}.json"
        self.results = Results(path, inputs, lambda: self.score(self.model), options.fresh, options.keep)
        kept = options.builds / f"{lab}-{kind}-{seed}-{inputs}" if options.builds is not None else None
        self.memories = Memories(self.model, self.tokenizer, self.references, seed, kept)
        self._tuned: dict[str, dict] = {}
        for one in () if options.fresh else self.results.content["settings"].values():
            what_it_was = {name: value for name, value in one.items() if name not in ("group", "options")}
            self._tuned[json.dumps(one["options"])] = what_it_was

    def measure(self, setting: Setting) -> dict[str, Change]:
        """Measures a setting and writes it; its change of the NLL by kind of text, with the interval."""
        entry = self._memory(setting) if setting.competitor is None else self._competitor(setting)
        self.results.put(setting, entry | {"reference_tokens": WINDOW * len(self._given(setting))})
        base = self.results.base
        return {text: paired_bootstrap(base[text], scores_of(found)) for text, found in entry["scores"].items()}

    def score(self, model: nn.Module) -> dict[str, Scores]:
        """Of the test windows, by kind of text."""
        return {text: score(model, rows, BATCH) for text, rows in self.tests.items()}

    def _given(self, setting: Setting) -> list[dict]:
        return self.references[: setting.references]

    def _memory(self, setting: Setting) -> dict:
        memory, seconds = self.memories.of(setting)
        attach_memory(self.model, memory)
        try:
            scores = self._stored(self.model)
        finally:
            detach_memory(self.model)
        nbytes = memory.nbytes + 4 * len(memory) * (memory.config.recall != "routing")  # and the next tokens
        made = {"keeps": True, "rows": len(memory), "bytes": nbytes, "build_seconds": round(seconds, 2)}
        return made | {"scores": scores}

    def _stored(self, model: nn.Module) -> dict[str, dict]:
        return {text: rounded(found) for text, found in self.score(model).items()}

    def _competitor(self, setting: Setting) -> dict:
        """At its rate, or at the best of its rates on validation text."""
        rates = (setting.rate,) if setting.rate is not None else RATES.get(setting.competitor, (None,))
        tried = {rate: self._at(replace(setting, rate=rate)) for rate in rates}
        rate = min(tried, key=lambda rate: tried[rate]["validation_nll"][str(rate)])
        return tried[rate] | {"validation_nll": {str(one): tried[one]["validation_nll"][str(one)] for one in rates}}

    def _at(self, setting: Setting) -> dict:
        """A competitor at one rate, trained once for all settings that ask for it."""
        name, rate, key = setting.competitor, setting.rate, json.dumps(setting.options())
        if key not in self._tuned:
            found = tuned(name, self.model, self._given(setting), self.seed, rate)
            with found.method.apply(self.model) as model:
                validation = score(model, self.texts.validation(self.kind), BATCH).mean_nll
                scores = self._stored(model)
            made = {"keeps": name in KEEPS_WEIGHTS, "bytes": found.nbytes, "build_seconds": round(found.seconds, 2)}
            self._tuned[key] = made | {"rate": rate, "validation_nll": {str(rate): validation}, "scores": scores}
        return self._tuned[key]


def chosen(options, lab: str, kind: str, seed: int) -> list[Setting]:
    """The settings planned for a cell, as far as the command line asks for them."""
    groups, names = set(options.groups or ()), set(options.settings or ())
    settings = grid() if names else planned(lab, kind, seed)
    return [s for s in settings if not (groups or names) or s.group in groups or s.name in names]


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    for lab in options.labs:
        for kind in options.kinds:
            for seed in options.seeds if options.seeds is not None else SEEDS_OF[kind]:
                settings = chosen(options, lab, kind, seed)
                if not settings:
                    continue
                cell = Cell(lab, kind, seed, options)
                for index, setting in enumerate(settings, 1):
                    if cell.results.has(setting) and not options.fresh:
                        continue
                    began = time.perf_counter()
                    changes = " ".join(f"{text} {change.mean:+.4f}" for text, change in cell.measure(setting).items())
                    where = f"{lab}-{kind}-{seed} {index}/{len(settings)}"
                    print(f"{where} {setting.name}: {changes} ({time.perf_counter() - began:.0f} s)", flush=True)
    write_report(options.results)


def parse(argv: list[str] | None):
    """The command line."""
    options = parser(__doc__)
    add = options.add_argument
    add("--labs", nargs="+", choices=LAB_MODELS, default=list(LABS))
    add("--kinds", nargs="+", choices=IN_DOMAIN, default=list(IN_DOMAIN))
    add("--seeds", nargs="+", type=int, help="default: those that are planned for each kind")
    add("--groups", nargs="+", choices=GROUPS, help="only these groups of settings")
    add("--settings", nargs="+", help="only these settings and those of --groups, in every cell")
    add("--references", type=int, default=10**6, help="at most so many windows of reference text, for a trial")
    add("--test-windows", type=int, default=TEST, help=f"windows of each test text, for a trial; default {TEST}")
    add("--builds", type=Path, help="keep the rows of builds in this folder, and use those that are there")
    add("--fresh", action="store_true", help="measure again what was measured")
    add("--keep", action="store_true", help="keep what was measured on other text beside the new figures")
    add_dtype(options)
    found = options.parse_args(argv)
    known = {setting.name for setting in grid()}
    if unknown := sorted(set(found.settings or ()) - known):
        options.error(f"{unknown[0]!r} is not a setting: choose among {', '.join(sorted(known))}.")
    if found.results == RESULTS and (found.references < 10**6 or found.test_windows != TEST):
        options.error("--references and --test-windows are for trials: choose a folder for these with --results.")
    if found.threads is not None:
        torch.set_num_threads(found.threads)
    return found


if __name__ == "__main__":
    main()
