"""
Metrics as modules of the library `evaluate`, which is imported by `load` alone; none needs a network.

Each metric is one script, which `evaluate` copies to its cache and runs there. Inputs with different meanings have
different names, so that `evaluate.combine` of any of them takes the inputs of all in one call.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from knnmoe_hf.errors import shown

if TYPE_CHECKING:
    from evaluate import EvaluationModule

METRICS = ("multiple_choice_accuracy", "perplexity", "routing_change", "expert_load", "paired_bootstrap")


def path(name: str) -> str:
    """
    The script of a metric, for `evaluate.load` and `evaluate.combine`.

    Raises:
        ValueError: for a name that is not in `METRICS`.
    """
    if name not in METRICS:
        raise ValueError(f"metric={shown(name)} is not known: choose among {', '.join(METRICS)}.")
    return str(Path(__file__).with_name(f"{name}.py"))


def load(name: str, **options) -> "EvaluationModule":
    """
    A metric: `evaluate.load` of its script.

    Args:
        name: one of `METRICS`.
        options: of `evaluate.load`, such as `keep_in_memory`.

    Raises:
        ValueError: for a name that is not in `METRICS`.
    """
    script = path(name)
    import evaluate  # here: it takes seconds, and whoever scores a model needs none of it

    return evaluate.load(script, **options)
