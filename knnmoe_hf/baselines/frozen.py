"""The model as it is: what every method is compared with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from knnmoe_hf.baselines.base import Method
from knnmoe_hf.models.attach import disable_memory
from knnmoe_hf.tasks.items import Item, Prompt


@dataclass
class Frozen(Method):
    """No adaptation."""

    source: ClassVar[str] = "none"

    def fit(self, model: nn.Module, references: Sequence[Item], seed: int = 0, tokenizer=None) -> None:
        """Learns nothing."""

    @contextmanager
    def apply(self, model: nn.Module, prompt: Prompt | None = None) -> Iterator[nn.Module]:
        """The model without any memory."""
        with disable_memory(model):
            yield model
