"""Which references are near to a question, and how likely answers are."""

import math

import pytest
import torch
from torch.nn import functional as F

from knnmoe_hf.baselines.answers import choice_scores
from knnmoe_hf.baselines.neighborhoods import Embedded, answer_nll, gaussian, read_prompts
from knnmoe_hf.models.gates import find_gates
from tests.baselines.items import random_items
from tests.support.models import FAMILIES, tiny_model


def test_neighbours_are_those_found_by_hand():
    # centred at (1, 1): right, up, left, down, and the question between right and up, nearer to right
    embedded = Embedded(torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 1.0], [1.0, 0.0]]))
    question = torch.tensor([1.8, 1.6])
    near = embedded.nearest(question, 3)
    assert near.indices.tolist() == [0, 1, 3] and len(near) == 3
    torch.testing.assert_close(near.similarities, torch.tensor([0.8, 0.6, -0.6]))
    squares = [0.4, 0.8, 3.2]  # 2 - 2 cos; their median is sigma^2
    kernel = torch.tensor([math.exp(-square / 1.6) for square in squares])
    torch.testing.assert_close(near.kernel, kernel / kernel.sum())


def test_questions_that_are_too_similar_and_the_question_itself_are_left_out():
    embedded = Embedded(torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 1.0], [1.0, 0.0]]), limit=0.7)
    assert embedded.nearest(torch.tensor([1.8, 1.6]), 3).indices.tolist() == [1, 3, 2]
    assert embedded.nearest(torch.tensor([1.8, 1.6]), 3, itself=1).indices.tolist() == [3, 2]
    alone = Embedded(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), limit=-2.0)
    assert len(alone.nearest(torch.tensor([2.0, 1.0]), 3)) == 0


def test_equal_distances_get_equal_weights():
    torch.testing.assert_close(gaussian(torch.tensor([0.5, 0.5])), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(gaussian(torch.zeros(2)), torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_read_in_batches_as_alone(family):
    model, prompts = tiny_model(family), [item.prompt.tokens for item in random_items(count=10)]
    gates = find_gates(model)
    embeddings, weights = read_prompts(model, prompts, gates)
    assert weights.shape == (10, len(gates), 8)
    for number in (0, 2, 9):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([prompts[number]]), output_hidden_states=True)
        torch.testing.assert_close(embeddings[number], output.hidden_states[-1][0].mean(0), atol=1e-5, rtol=1e-4)
        alone = read_prompts(model, [prompts[number]], gates)
        torch.testing.assert_close(weights[number], alone[1][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights.sum(-1), torch.ones(10, len(gates)))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_as_likely_as_choices_are_scored(family):
    model = tiny_model(family)
    for item in random_items(count=3):
        nll = answer_nll(model, [(item.prompt.tokens, choice) for choice in item.choices])
        torch.testing.assert_close(-nll.detach(), choice_scores(model, item), atol=1e-4, rtol=1e-4)


def test_answers_of_different_prompts_share_a_pass():
    model, items = tiny_model("olmoe"), random_items(count=3)
    pairs = [(item.prompt.tokens, item.choices[item.answer]) for item in items]
    together = answer_nll(model, pairs)
    assert len({len(prompt) for prompt, _ in pairs}) == 3
    for pair, nll in zip(pairs, together):
        logits = model(input_ids=torch.tensor([[*pair[0], *pair[1]]])).logits[0, len(pair[0]) - 1 : -1]
        torch.testing.assert_close(nll, F.cross_entropy(logits, torch.tensor(pair[1]), reduction="sum"))


def test_a_question_without_tokens_is_refused():
    with pytest.raises(ValueError, match="a question has no tokens"):
        read_prompts(tiny_model("olmoe"), [(1, 2), ()])
