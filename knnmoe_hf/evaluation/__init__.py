"""Base against memory: scores per token and what can be said of their difference."""

from knnmoe_hf.evaluation.compare import Comparison, compare
from knnmoe_hf.evaluation.scores import Change, Scores, paired_bootstrap, score

__all__ = ["Change", "Comparison", "Scores", "compare", "paired_bootstrap", "score"]
