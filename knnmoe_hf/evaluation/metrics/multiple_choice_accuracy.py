"""Accuracy on multiple-choice items, from the log-likelihood of each choice, as lm-evaluation-harness defines it."""

import datasets
import evaluate
import numpy

_DESCRIPTION = """
Share of items whose right choice has the highest log-likelihood: as it is (acc), divided by the choice's characters
(acc_norm), and by its bytes in UTF-8 (acc_bytes). Of equal ones the first is chosen.
"""
_INPUTS = """
Args:
    predictions: for each item the log-likelihood of each choice, in nats.
    references: for each item the index of the right choice.
    choices: for each item the text of each choice, without the space before it.
Returns:
    acc, acc_norm, acc_bytes: from 0 to 1.
"""


class MultipleChoiceAccuracy(evaluate.Metric):
    """`acc`, `acc_norm` and `acc_bytes` of lm-evaluation-harness, for items with one right choice."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Value("int64"),
            "choices": datasets.Sequence(datasets.Value("string")),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
            reference_urls=["https://github.com/EleutherAI/lm-evaluation-harness"],
        )

    def _compute(self, *, predictions, references, choices, **others) -> dict[str, float]:
        hits = {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
        for number, (scores, right, texts) in enumerate(zip(predictions, references, choices)):
            if len(scores) != len(texts) or not 0 <= right < len(scores) or not all(texts):
                raise ValueError(
                    f"item {number} has {len(scores)} log-likelihoods, {len(texts)} choices and the right one "
                    f"{right}: give one log-likelihood for each choice, none of them empty, and an index of them."
                )
            if numpy.isnan(scores).any():  # argmax would choose it
                raise ValueError(f"item {number} has a log-likelihood that is not a number: score it again.")
            lengths = {
                "acc": [1] * len(texts),
                "acc_norm": [len(text) for text in texts],
                "acc_bytes": [len(text.encode()) for text in texts],
            }
            for name, by in lengths.items():
                hits[name] += int(numpy.argmax(numpy.array(scores) / numpy.array(by, dtype=float))) == right
        if not predictions:
            raise ValueError("there are no items: give at least one.")
        return {name: count / len(predictions) for name, count in hits.items()}
