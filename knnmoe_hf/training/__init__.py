"""Building memories."""

from knnmoe_hf.training.arguments import KNNMoETrainingArguments
from knnmoe_hf.training.trainer import KNNMoETrainer

__all__ = ["KNNMoETrainer", "KNNMoETrainingArguments"]
