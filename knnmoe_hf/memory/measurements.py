"""What was measured of a memory beside its verdict: confidence by layer and token, results on named text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from knnmoe_hf.memory.numbers import check, is_count, is_finite
from knnmoe_hf.memory.verdict import NllChange

_MOST = 1e6  # nats per token, beyond which a picture could not be drawn
LONGEST = 300
"""Letters that a text of a card may have."""


@dataclass(frozen=True)
class EvaluatedText:
    """
    One text on which the memory was evaluated after it was built (`eval_dataset` of the trainer).

    Attributes:
        name: of the text.
        tokens: targets that were scored.
        base_nll: mean NLL of the model without the memory, in nats per token.
        change: of it with the memory.
        left_out: windows that were not scored, as they overlap the references.
        overlap: of the runs of 8 tokens, the share that the references have too; None if that is not known.
    """

    name: str
    tokens: int
    base_nll: float
    change: NllChange
    left_out: int = 0
    overlap: float | None = None

    @classmethod
    def of_json(cls, entry: Mapping[str, Any]) -> "EvaluatedText":
        """From plain JSON values."""
        return cls(**dict(entry) | {"change": NllChange(**entry["change"])})

    def __post_init__(self):
        sound = {
            "name": is_line(self.name),
            "tokens and left_out": is_count(self.tokens) and is_count(self.left_out),
            "base_nll": is_finite(self.base_nll) and self.base_nll >= 0,
            "change": isinstance(self.change, NllChange),
            "overlap": self.overlap is None or _is_share(self.overlap),
        }
        check(sound, self)


@dataclass(frozen=True)
class LayerConfidence:
    """
    How far one layer opens, in the mean over tokens: 0 routes as the gate does, 1 as the neighbours do.

    Attributes:
        layer: index of the decoder layer.
        references: on held-out references; None if none could be held out.
        background: on background text; None if there was none.
    """

    layer: int
    references: float | None
    background: float | None

    def __post_init__(self):
        means = (self.references, self.background)
        sound = {
            "layer": is_count(self.layer),
            "means": all(mean is None or _is_share(mean) for mean in means),
        }
        check(sound, self)


@dataclass(frozen=True)
class ConfidenceBin:
    """
    Tokens on which the memory is about equally confident, and what it does to them.

    Attributes:
        confidence: mean confidence of the tokens, each taken in the mean over its layers.
        change: mean change of their NLL, in nats per token; below 0 the memory helps.
        tokens: how many they are.
    """

    confidence: float
    change: float
    tokens: int

    def __post_init__(self):
        sound = {
            "confidence": _is_share(self.confidence),
            "change": is_finite(self.change) and abs(self.change) <= _MOST,
            "tokens": is_count(self.tokens) and self.tokens > 0,
        }
        check(sound, self)


@dataclass(frozen=True)
class Measurements:
    """
    What was measured beside the verdict, in the same passes, and on the texts of `eval_dataset`.

    They hold as long as the verdict does: a memory without a verdict has none.

    Attributes:
        base_nll: mean NLL of held-out references without the memory, in nats per token; None if none were held out.
        elsewhere_nll: `{kind of background text: mean NLL without the memory}`.
        layers: mean confidence by layer.
        references, background: tokens of held-out references, and of background text, by their confidence.
        evaluations: the texts of `eval_dataset`.
    """

    base_nll: float | None = None
    elsewhere_nll: Mapping[str, float] = field(default_factory=dict)
    layers: list[LayerConfidence] = field(default_factory=list)
    references: list[ConfidenceBin] = field(default_factory=list)
    background: list[ConfidenceBin] = field(default_factory=list)
    evaluations: list[EvaluatedText] = field(default_factory=list)

    @classmethod
    def of_json(cls, entry: Mapping[str, Any]) -> "Measurements":
        """From plain JSON values."""
        parts = {
            "layers": [LayerConfidence(**one) for one in entry["layers"]],
            "references": [ConfidenceBin(**one) for one in entry["references"]],
            "background": [ConfidenceBin(**one) for one in entry["background"]],
            "evaluations": [EvaluatedText.of_json(one) for one in entry["evaluations"]],
        }
        return cls(**dict(entry) | parts)

    def __post_init__(self):
        kinds, numbers = self.elsewhere_nll, [one.layer for one in _of(self.layers, LayerConfidence) or ()]
        sound = {
            "base_nll": self.base_nll is None or is_finite(self.base_nll),
            "elsewhere_nll": isinstance(kinds, Mapping) and all(map(is_finite, kinds.values())),
            "layers": _of(self.layers, LayerConfidence) is not None and len(set(numbers)) == len(numbers),
            "references": _of(self.references, ConfidenceBin) is not None,
            "background": _of(self.background, ConfidenceBin) is not None,
            "evaluations": _of(self.evaluations, EvaluatedText) is not None,
        }
        check(sound, self)


def is_line(value: Any) -> bool:
    """Whether a value is a text of one line of at most `LONGEST` letters, without invisible ones."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST and value.isprintable() and bool(value.strip())


def one_line(text: str) -> str:
    """A text on one line, without letters that cannot be seen."""
    return "".join(letter if letter.isprintable() else " " for letter in " ".join(text.split()))


def printable(text: Any) -> str:
    """A text as `is_line` asks for it: on one line, cut, without invisible letters."""
    return one_line(str(text)).strip()[:LONGEST] or "not named"


def _of(values: Any, kind: type) -> list | None:
    """The list itself if all that is in it is of a kind."""
    return values if isinstance(values, list) and all(isinstance(one, kind) for one in values) else None


def _is_share(value: Any) -> bool:
    return is_finite(value) and 0 <= value <= 1
