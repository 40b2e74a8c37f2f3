"""`BuildOptions`: what a build adds to `TrainingArguments`, and what it defaults otherwise.

This module imports no other library, so that the command line can show its options and refuse bad ones at once.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from knnmoe_hf.errors import shown

BUILDERS = {"candidates": 10, "topk": 10, "search": 20}
"""The builders by name, with the default of `builder_steps` of each."""

PROVENANCE = ("text", "ids", "none")
"""What a saved memory tells of its references: their token ids, their example ids and positions alone, or nothing."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class BuildOptions:
    """
    The options of a build; `KNNMoETrainingArguments` documents each of them.

    Raises:
        ValueError: by `check_options`, for a value that is not allowed.
    """

    builder: str = _option("candidates", f"How logits are optimised: {', '.join(BUILDERS)}.")
    builder_steps: int | None = _option(None, "Steps for each batch; 10 by default, 20 with search.")
    num_candidates: int | None = _option(None, "Experts per token in the first steps; twice the top-k by default.")
    candidate_steps: int | None = _option(None, "Steps with num_candidates experts; half of the steps by default.")
    max_length: int | None = _option(1024, "Longer examples are cut to so many tokens.")
    max_rows: int | None = _option(None, "Keep at most so many rows, those whose NLL fell most.")
    min_gain: float | None = _option(None, "Keep only rows whose NLL fell by at least so many nats.")
    num_layers: int | None = _option(None, "Keep so many layers, those that help most on held-out references.")
    dataset_text_field: str = _option("text", "The column that holds the text of a row.")
    ignore_columns: list[str] | None = _option(None, "Columns that are left out; any other unknown one is an error.")
    skip_bad_rows: bool = _option(False, "Leave out rows that cannot be used, and say how many, instead of stopping.")
    save_provenance: str = _option("text", "What is saved of the references: text (their token ids), ids or none.")
    save_next_tokens: bool = _option(
        False, "Keep the token that follows each row where the text is left out; in order these are the text."
    )
    allow_overlap: bool = _option(False, "Evaluate on text that the memory holds too, instead of leaving it out.")
    overwrite: bool = _option(False, "Write over files in the output folder that are not of this memory.")
    model_name: str | None = _option(None, "Title of the memory's card.")
    license: str | None = _option(None, "Licence of the reference data, such as cc-by-4.0; default: not stated.")
    language: list[str] | None = _option(None, "Languages of the reference data, such as en or code.")
    dataset_name: str | None = _option(
        None, "What the card calls the reference data; default: its name, without folders."
    )
    dataset_tags: list[str] | None = _option(None, "Repositories of the reference data on the Hub.")
    learning_rate: float = _option(0.3, "Adam's learning rate on the logits.")
    adam_epsilon: float = _option(1e-4, "Adam's epsilon, relative to a token's gradient.")

    def check_options(self) -> None:
        """Checks every option, and sets `builder_steps` to the builder's default if it is None."""
        self._check_names()
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name}={shown(value)} is not allowed: use an integer of at least {least}.")
        if self.min_gain is not None and not _is_finite(self.min_gain):
            raise ValueError(f"min_gain={shown(self.min_gain)} is not allowed: use a finite number, or None.")
        for name in ("learning_rate", "adam_epsilon"):
            value = getattr(self, name)
            if not _is_finite(value) or value < 0:
                raise ValueError(f"{name}={shown(value)} is not allowed: use a finite number of at least 0.")
        for name in ("skip_bad_rows", "save_next_tokens", "allow_overlap", "overwrite"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={shown(getattr(self, name))} is not allowed: use True or False.")
        if self.builder_steps is None:
            self.builder_steps = BUILDERS[self.builder]
        self._check_candidates()
        if given := self.card_statements():
            from knnmoe_hf.memory.card_data import CardData  # with it torch is loaded

            CardData().stated(**given)

    def card_statements(self) -> dict[str, Any]:
        """What the card states, by the names of `knnmoe_hf.memory.card_data.CardData`; without what is not given."""
        given = {name: getattr(self, name) for name in ("model_name", "license", "language", "dataset_tags")}
        given |= {"dataset": self.dataset_name}
        return {name: value for name, value in given.items() if value is not None}

    def check_recall(self, recall: str) -> None:
        """
        Checks that a memory of this `recall` is saved with what it needs.

        Raises:
            ValueError: if its rows' next tokens would be left out.
        """
        if recall != "routing" and self.save_provenance != "text" and not self.save_next_tokens:
            raise ValueError(
                f"recall={recall!r} is not allowed with save_provenance={self.save_provenance!r}, which leaves out "
                "the tokens that it needs: set save_next_tokens=True, save_provenance='text' or recall='routing'."
            )

    def _check_names(self) -> None:
        for name, allowed in (("builder", BUILDERS), ("save_provenance", PROVENANCE)):
            if getattr(self, name) not in tuple(allowed):
                value = shown(getattr(self, name))
                raise ValueError(f"{name}={value} is not allowed: choose one of {', '.join(allowed)}.")
        if not isinstance(self.dataset_text_field, str) or not self.dataset_text_field:
            raise ValueError(
                f"dataset_text_field={shown(self.dataset_text_field)} is not allowed: name the column of the text."
            )
        columns = self.ignore_columns
        if columns is not None and not (isinstance(columns, list) and all(isinstance(name, str) for name in columns)):
            raise ValueError(f"ignore_columns={shown(columns)} is not allowed: use a list of names, or None.")

    def _check_candidates(self) -> None:
        for name in ("num_candidates", "candidate_steps"):
            if self.builder != "candidates" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not allowed with builder={self.builder!r}: leave it out, or use "
                    "builder='candidates'."
                )
        if self.candidate_steps is not None and self.candidate_steps >= self.builder_steps:
            raise ValueError(
                f"candidate_steps={self.candidate_steps} is not allowed: use fewer than builder_steps="
                f"{self.builder_steps}, so that the last steps run with the model's own top-k."
            )


_COUNTS = {  # smallest allowed value of each integer option
    "builder_steps": 1,
    "num_candidates": 1,
    "candidate_steps": 0,
    "max_length": 2,
    "max_rows": 1,
    "num_layers": 1,
}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
