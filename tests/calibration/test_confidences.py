"""How confident a memory is, token by token: what its lookups say, beside the scores of the same passes."""

import pytest
import torch

from knnmoe_hf.calibration.confidences import Watched, bins_of, layers_of, score_watched
from knnmoe_hf.evaluation.scores import Scores, score_kinds
from knnmoe_hf.models.attach import prepare
from knnmoe_hf.models.calls import Overrides
from knnmoe_hf.models.hooks import hooked, using_overrides
from tests.support.domain import domain
from tests.support.models import random_memory, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("olmoe")


def rows(lengths=(9, 5, 12), seed=4) -> list[dict]:
    """Of several lengths, so that batches are padded; the first two tokens of each are not targets."""
    found = []
    for index, length in enumerate(lengths):
        ids = domain(1, seed + index, length)[0]["input_ids"]
        found.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "attention_mask": [1] * length})
    return [one | {"example_id": index} for index, one in enumerate(found)]


@pytest.mark.parametrize("options", [{}, {"recall": "both"}, {"confidence": "context"}], ids=str)
def test_scores_are_those_without_watching_and_confidences_those_of_the_lookups(model, options):
    texts = {"a": rows(), "b": rows((4, 7), seed=9), "c": []}
    with hooked(model):
        prepared = prepare(model, random_memory(model, **options))
        watched = score_watched(model, texts, prepared, batch_size=2)
        with using_overrides(model, prepared):
            scored = score_kinds(model, texts, batch_size=2)
        one_by_one = score_watched(model, texts, prepared, batch_size=1)
    for kind, found in watched.items():
        assert all(torch.equal(getattr(found.scores, name), getattr(scored[kind], name)) for name in vars(scored["a"]))
        targets = sum(len(row["input_ids"]) - 2 for row in texts[kind])
        assert found.nll.shape == (targets,) and found.nll.sum().item() == pytest.approx(scored[kind].nll.sum().item())
        if kind != "c":
            assert found.confidence.shape == (2, targets)
            assert bool((found.confidence >= 0).all()) and bool((found.confidence <= 1).all())
            torch.testing.assert_close(found.confidence, one_by_one[kind].confidence)  # padding is not among them
    assert float(watched["a"].confidence.std()) > 0


def test_without_a_memory_there_is_no_confidence(model):
    with hooked(model):
        found = score_watched(model, {"a": rows()}, Overrides({}), batch_size=2)["a"]
    assert found.confidence.shape == (0, len(found.nll)) and len(found.nll) == 20
    assert bins_of([found], [found]) == []
    assert layers_of([0, 1], found, []) == layers_of([0, 1], Watched.nothing(), [Watched.nothing()])
    assert layers_of([0], found, [])[0].references is None


def watched(confidence: list[float], nll: list[float]) -> Watched:
    sums = Scores(torch.tensor([sum(nll)]), torch.zeros(1), torch.tensor([float(len(nll))]))
    return Watched(sums, torch.tensor(nll), torch.tensor([confidence, confidence]))


def test_bins_hold_all_tokens_by_rising_confidence():
    confidence = [((7 * place) % 50) / 50 for place in range(50)]
    used, base = watched(confidence, [1 - one for one in confidence]), watched([], [1.0] * 50)
    found = bins_of([base], [used])
    assert [one.tokens for one in found] == [25, 25]
    assert found[0].confidence == pytest.approx(0.24) and found[1].confidence == pytest.approx(0.74)
    assert found[0].change == pytest.approx(-0.24) and found[1].change == pytest.approx(-0.74)
    assert len(bins_of([watched([], [1.0] * 900)], [watched([0.5] * 900, [1.0] * 900)])) == 10
    (few,) = bins_of([watched([], [1.0])], [watched([1.0], [0.5])])
    assert (few.confidence, few.change, few.tokens) == (1.0, -0.5, 1)


def test_layers_are_means_over_all_kinds_of_background_text():
    references, one, other = watched([1.0, 0.5], [1.0, 1.0]), watched([0.1], [1.0]), watched([0.2, 0.3], [1.0, 1.0])
    first, second = layers_of([3, 5], references, [one, other])
    assert (first.layer, second.layer) == (3, 5)
    assert first.references == pytest.approx(0.75) and first.background == pytest.approx(0.2)
