"""What `config.json` says of a saved memory, checked before a tensor is opened."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.blocks import Bounds
from knnmoe_hf.lookup.layer import bounds as layer_bounds
from knnmoe_hf.lookup.layer import specification
from knnmoe_hf.lookup.options import FIXED_AT_BUILD, RECALLS, RetrievalOptions
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.memory import next_tokens
from knnmoe_hf.memory.card_data import CardData
from knnmoe_hf.memory.fingerprint import is_fingerprint
from knnmoe_hf.memory.layer_sizes import LayerSizes
from knnmoe_hf.memory.numbers import SMALL, are_texts, check, is_count, is_finite, is_moderate, is_text
from knnmoe_hf.memory.plain_files import is_inside, unusable
from knnmoe_hf.memory.provenance import Provenance
from knnmoe_hf.memory.sweep import SweepPoint
from knnmoe_hf.memory.task_record import TaskRecord
from knnmoe_hf.memory.verdict import Verdict
from knnmoe_hf.memory.versions import FORMAT_VERSION, check_version, in_this_version

_BACKGROUND_SOURCES = ("given", "this machine")
_MOST_ROWS = 2**40
_CONTROLS = re.compile(r"(?<!\\)(?:\\\\)*(\\u00(?:[0189][0-9a-f]|7f))")  # as JSON spells them


@dataclass(frozen=True)
class Origin:
    """
    What a memory was built from; edits change no more of it than they must.

    Attributes:
        options: how the rows are stored, the options of `knnmoe_hf.lookup.options.FIXED_AT_BUILD`.
        base_model_class: such as `"OlmoeForCausalLM"`.
        base_model_fingerprint: see `knnmoe_hf.memory.fingerprint`.
        tokenizer_fingerprint: likewise.
        reference_set_hash: SHA-256 of the examples' tokens and labels; None once rows were added or removed.
    """

    options: Mapping[str, Any]
    base_model_class: str | None = None
    base_model_fingerprint: Mapping[str, Any] | None = None
    tokenizer_fingerprint: str | None = None
    reference_set_hash: str | None = None


@dataclass(frozen=True)
class CalibrationRecord:
    """
    What a calibration read, and what it found (`knnmoe_hf.calibrate`).

    A calibration that found nothing to fit leaves a record of what it read: `threshold`, `gain` and `open_gain` are
    None then. Of a threshold that was chosen afterwards (`RoutingMemory.with_threshold`) `harm` is not known, and
    `gain` where it is a point of the sweep. With fewer layers (`select_layers`) neither is.

    Attributes:
        threshold: at which the memory opens, between background text (0) and the references (1).
        gain: what the memory is expected to gain on held-out references, in nats per token; None if it is not known.
        open_gain: the same of a memory that is always open.
        harm: `{kind of background text: nats per token that the memory costs on it}`.
        excluded: kinds of background text that the open memory helps on, so that they count as its domain.
        background: `{kind: {"source", "files", "examples", "tokens", "sha256"}}`: whether the user gave the text
            (`"given"`) or it was found on the machine (`"this machine"`), the names of the files that it was read
            from, how many examples and tokens were read, and the SHA-256 of their token ids.
        fits: `{recall: RecallFit}` of `"next_tokens"` and `"both"`; empty where next tokens were not fitted. Those of
            `"routing"` are `threshold`, `gain` and `harm`.
        sweep: what is expected at each threshold, ascending; empty in older memories.

    Raises:
        ValueError: for contents of another form.
    """

    threshold: float | None
    gain: float | None
    open_gain: float | None
    harm: Mapping[str, float]
    excluded: list[str]
    background: Mapping[str, Mapping[str, Any]]
    fits: Mapping[str, RecallFit] = field(default_factory=dict)
    sweep: list[SweepPoint] = field(default_factory=list)

    @classmethod
    def of_json(cls, entry: dict) -> "CalibrationRecord":
        """From plain JSON values."""
        fits = {recall: RecallFit(**fit) for recall, fit in entry["fits"].items()}
        points = entry["sweep"]
        sweep = [SweepPoint(**point) for point in points] if isinstance(points, list) else points
        return cls(**entry | {"fits": fits, "sweep": sweep})

    def __post_init__(self):
        found, gain = [self.threshold, self.open_gain], self.gain
        known = all(map(is_finite, found)) and (gain is None or is_finite(gain))
        sound = {
            "threshold, gain and open_gain": known or [*found, gain] == [None] * 3,
            "harm": isinstance(self.harm, Mapping) and all(map(is_finite, self.harm.values())),
            "excluded": are_texts(self.excluded),
            "background": isinstance(self.background, Mapping) and all(map(_is_background, self.background.values())),
            "fits": isinstance(self.fits, Mapping) and all(_is_fit(*item) for item in self.fits.items()),
            "sweep": isinstance(self.sweep, list) and all(isinstance(point, SweepPoint) for point in self.sweep),
        }
        check(sound, self)
        fitted_on = {kind for fit in self.fits.values() for kind in fit.harm}
        if unknown := {*self.harm, *self.excluded, *fitted_on} - set(self.background):
            raise ValueError(f"background of a CalibrationRecord says nothing of the kinds {shown(sorted(unknown))}.")


def _is_background(text: Any) -> bool:
    if not isinstance(text, Mapping) or set(text) != {"source", "files", "examples", "tokens", "sha256"}:
        return False
    counts = is_count(text["examples"]) and is_count(text["tokens"])
    return text["source"] in _BACKGROUND_SOURCES and are_texts(text["files"]) and counts and is_text(text["sha256"])


def _is_fit(recall: Any, fit: Any) -> bool:
    if recall not in RECALLS or recall == "routing" or not isinstance(fit, RecallFit):
        return False
    numbers = [fit.threshold, fit.width, fit.next_token_weight, fit.next_token_temperature]
    numbers += [] if fit.gain is None else [fit.gain]
    harm = isinstance(fit.harm, Mapping) and all(map(is_finite, fit.harm.values()))
    if not all(map(is_moderate, numbers)) or not harm or not is_count(fit.next_token_neighbors):
        return False
    if fit.routing_threshold is not None and not is_moderate(fit.routing_threshold):
        return False
    positive = min(fit.width, fit.next_token_temperature) > SMALL and fit.next_token_neighbors > 0
    return positive and 0 <= fit.next_token_weight < 1 and fit.next_token_neighbors < 2**63


def seal(content: dict) -> str:
    """SHA-256 of the `memory` entry without its own `sha256`, in canonical JSON."""
    unsealed = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """
    The `memory` entry of `config.json`.

    Attributes:
        origin: what the memory was built from.
        layers: sizes and scales.
        rows: N, of every layer.
        provenance: numbers of examples, tokens and hashes of n-grams that are kept; None if provenance was left out.
        next_tokens: whether the token that follows each row is stored; it is not where the text is.
        tokenizer_files: none if no tokenizer was saved.
        digests: SHA-256 of README.md, of each tokenizer file and of the index of the shards, as they were written: by
            it a later save knows which files are its own. Empty in a memory of an older version.
        files: the shards, `{"name", "sha256", "bytes"}` each.
        library_versions: that wrote the memory.
        calibration: what a calibration read and found, or None.
        verdict: whether the memory helps; None if that was not measured. Older memories have no such entry.
        task_record: the benchmark that the memory was built from, or None; likewise.
        card_data: what the card says beside; empty in a memory of an older version.
        format_version: that it was read from; the present one is written.
    """

    origin: Origin
    layers: list[LayerSizes]
    rows: int
    provenance: tuple[int, int, int] | None
    next_tokens: bool
    tokenizer_files: list[str]
    digests: dict[str, str]
    files: list[dict]
    library_versions: dict[str, str]
    calibration: CalibrationRecord | None = None
    verdict: Verdict | None = None
    task_record: TaskRecord | None = None
    card_data: CardData | None = None
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict:
        """As plain JSON values, sealed with their own SHA-256."""
        content = asdict(self) | {"format_version": FORMAT_VERSION}
        return content | {"sha256": seal(content)}

    @classmethod
    def from_json(cls, content: Any, path: Path) -> "Manifest":
        """
        Of any format version that this library reads.

        Raises:
            MemoryFileError: naming `path` and what is missing or wrong.
        """
        check_version(content, path)
        try:
            parts = {"verdict": None, "task_record": None} | in_this_version(content)
            parts = {field.name: parts[field.name] for field in fields(cls)}
            parts["origin"] = Origin(**parts["origin"])
            parts["layers"] = [LayerSizes.of_json(entry) for entry in parts["layers"]]
            kinds = dict(calibration=CalibrationRecord, verdict=Verdict, task_record=TaskRecord, card_data=CardData)
            parts |= {name: kind.of_json(parts[name]) for name, kind in kinds.items() if parts[name] is not None}
            manifest = cls(**parts)
            manifest._check()
            if (found := _CONTROLS.search(json.dumps(content))) is not None:
                raise ValueError(f"one of its texts holds {found[1]}, which may change the terminal that shows it")
            if content["sha256"] != seal(content):
                raise ValueError("its sha256 is not that of its contents, so it was edited")
            return manifest
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            if isinstance(error, KeyError):
                reason = f"it has no entry {shown(error.args[0])}"
            else:
                reason = f"{type(error).__name__}: {shown(str(error))}"
            raise unusable(path, f"its entry `memory` does not describe a routing memory ({reason})") from error

    def _check(self) -> None:
        numbers = [entry.layer for entry in self.layers]
        if twice := [layer for layer, count in Counter(numbers).items() if count > 1]:
            raise ValueError(f"layer {twice[0]} is described twice")
        origin, kept, versions = self.origin, self.provenance, self.library_versions
        texts = (origin.base_model_class, origin.tokenizer_fingerprint, origin.reference_set_hash)
        sound = {
            "options": set(origin.options) == set(FIXED_AT_BUILD) and RetrievalOptions(**origin.options) is not None,
            "origin": all(text is None or is_text(text) for text in texts),
            "base_model_fingerprint": is_fingerprint(origin.base_model_fingerprint),
            "rows": is_count(self.rows) and self.rows < _MOST_ROWS,
            "layers": len(self.layers) > 0,
            "provenance": kept is None or type(kept) is list and len(kept) == 3 and all(map(is_count, kept)),
            "next_tokens": type(self.next_tokens) is bool,
            "tokenizer_files": are_texts(self.tokenizer_files) and all(map(_is_file_name, self.tokenizer_files)),
            "digests": isinstance(self.digests, dict)
            and are_texts(list(self.digests.values()))
            and all(map(_is_file_name, self.digests)),
            "files": isinstance(self.files, list),
            "library_versions": isinstance(versions, dict) and are_texts(list(versions.values())),
        }
        for name, right in sound.items():
            if not right:
                raise ValueError(f"{name} is not what it should be")

    def bounds(self) -> dict[str, Bounds]:
        """What the numbers in these tensors can be, by name."""
        options, known = self.origin.options, Provenance.bounds() | next_tokens.bounds()
        for entry in self.layers:
            for name, bounds in layer_bounds(entry.num_experts, options).items():
                known[f"layers.{entry.layer}.{name}"] = bounds
        return known

    def specification(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor that the shards must hold, by name."""
        expected = {}
        for entry in self.layers:
            sizes = (self.rows, entry.hidden_size, entry.num_experts, entry.sample)
            for name, kind in specification(*sizes, self.origin.options).items():
                expected[f"layers.{entry.layer}.{name}"] = kind
        if self.provenance is not None:
            expected |= Provenance.specification(self.rows, *self.provenance)
        if self.next_tokens:
            expected |= next_tokens.specification(self.rows)
        return expected


def _is_file_name(name: str) -> bool:
    """Whether a memory may call one of the files beside its tensors so."""
    return is_inside(name) and name != "config.json"
