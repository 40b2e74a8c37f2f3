"""Comparing a base model with the same model and a memory: scores per token, with intervals of the change."""

from knnmoe_hf.evaluation.compare import Comparison, compare
from knnmoe_hf.evaluation.overlap import Overlap, without_overlap
from knnmoe_hf.evaluation.scores import Change, Scores, paired_bootstrap, score

__all__ = ["Change", "Comparison", "Overlap", "Scores", "compare", "paired_bootstrap", "score", "without_overlap"]
