"""What else the same reference tokens could buy: competitors of a memory, and what each would ship."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from knnmoe_hf.baselines import Method, make_method
from knnmoe_hf.tasks.items import text_items

COMPETITORS = {
    "constant bias": "constant_bias",
    "router-only": "router_only",
    "LoRA": "lora",
    "full fine-tuning": "full_fine_tuning",
}
"""Their names in `knnmoe_hf.baselines.METHODS`."""
RATES = {"constant bias": (0.01, 0.03), "LoRA": (3e-4, 1e-3, 3e-3)}
"""Learning rates that are tried; the one with the least NLL on validation text is taken."""
KEEPS_WEIGHTS = ("constant bias", "LoRA")
"""Competitors that leave the model's own weights as they are, and can be taken off again."""


@dataclass(frozen=True)
class Tuned:
    """
    A competitor after its training.

    Attributes:
        method: `method.apply(model)` is the context in which the model has it.
        nbytes: of what would be shipped beside the base model, in the dtype that it was trained in.
        seconds: CPU time of the training.
    """

    method: Method
    nbytes: int
    seconds: float


def tuned(name: str, model: nn.Module, rows: Sequence[dict], seed: int, rate: float | None = None) -> Tuned:
    """A competitor trained on a model, which is left as it was; `rate` is one of its `RATES`, if it has any."""
    method = make_method(COMPETITORS[name], **({} if rate is None else {"learning_rates": [rate]}))
    began = time.process_time()
    method.fit(model, text_items(rows), seed)
    return Tuned(method, method.nbytes, time.process_time() - began)
