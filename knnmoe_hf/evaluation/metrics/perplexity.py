"""Perplexity of texts, from their log-likelihoods and numbers of tokens."""

import math
import sys

import datasets
import evaluate

from knnmoe_hf.errors import shown

_LARGEST = math.log(sys.float_info.max)  # whose exp is a number still
_DESCRIPTION = """
exp of the mean negative log-likelihood per token, over the tokens of all texts: a long text counts for more than a
short one. With words or bytes in place of tokens it is the word_perplexity or byte_perplexity of
lm-evaluation-harness, and with 1 for each text its perplexity.
"""
_INPUTS = """
Args:
    loglikelihoods: of each text, in nats.
    token_counts: number of tokens that each log-likelihood is the sum of.
Returns:
    perplexity: at least 1.
    mean_nll: in nats per token.
"""


class Perplexity(evaluate.Metric):
    """`perplexity` and `mean_nll`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"loglikelihoods": datasets.Value("float64"), "token_counts": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
            reference_urls=["https://github.com/EleutherAI/lm-evaluation-harness"],
        )

    def _compute(self, *, loglikelihoods, token_counts, **others) -> dict[str, float]:
        if not any(token_counts) or min(token_counts) < 0:
            raise ValueError(
                f"token_counts={shown(token_counts)} is not allowed: give the number of tokens that each "
                "log-likelihood is the sum of, at least one of them above 0."
            )
        if sum(loglikelihoods) > 0:
            raise ValueError(
                f"the log-likelihoods have the sum {sum(loglikelihoods)}, and none can be above 0: give them with "
                "their sign."
            )
        mean = -sum(loglikelihoods) / sum(token_counts)
        return {"perplexity": math.exp(mean) if mean < _LARGEST else math.inf, "mean_nll": mean}
