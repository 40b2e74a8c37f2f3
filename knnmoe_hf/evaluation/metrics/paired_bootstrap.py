"""The change of a mean over items from one run to another, with its interval."""

import datasets
import evaluate
import torch

from knnmoe_hf.evaluation.scores import mean_change

_DESCRIPTION = """
Change of the mean of a score from one run to another over the same items, with a 95 % percentile bootstrap interval:
whole items are resampled, each with both of its scores.
"""
_INPUTS = """
Args:
    base_scores, scores: of each item in the first and in the second run, such as 1 for a right answer and 0 for a
        wrong one, in the same order.
    resamples: number of bootstrap samples, 2000 by default.
    resampling_seed: random seed of the resampling, 0 by default.
Returns:
    mean_change: mean of the second run minus mean of the first.
    mean_change_low, mean_change_high: bounds of the interval; None if there are fewer than 5 items.
    mean_change_items: number of items.
"""


class PairedBootstrap(evaluate.Metric):
    """`mean_change` with its bounds: `knnmoe_hf.evaluation.scores.mean_change`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"base_scores": datasets.Value("float64"), "scores": datasets.Value("float64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, *, base_scores, scores, resamples: int = 2000, resampling_seed: int = 0, **others) -> dict:
        before, after = (torch.tensor(values, dtype=torch.float64) for values in (base_scores, scores))
        change = mean_change(before, after, resamples, resampling_seed)
        return {
            "mean_change": change.mean,
            "mean_change_low": change.low,
            "mean_change_high": change.high,
            "mean_change_items": change.windows,
        }
