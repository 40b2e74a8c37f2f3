"""Choices are scored as the harness does, whatever their lengths."""

import pytest
import torch

from knnmoe_hf.baselines.answers import answered_correctly, choice_scores
from knnmoe_hf.tasks.items import Item, Prompt
from tests.support.models import tiny_model


def item(prompt=(5, 6, 7), choices=((8,), (9, 10, 11), (12, 13)), answer=0) -> Item:
    return Item(Prompt("a", prompt, ""), choices, answer)


@pytest.mark.parametrize("prompt", [(5, 6, 7), (5,), ()])
def test_a_score_is_the_sum_of_the_log_probabilities_of_the_choice(prompt):
    model, one = tiny_model("olmoe"), item(prompt)
    found = choice_scores(model, one)
    for score, choice in zip(found, one.choices):
        ids = torch.tensor([prompt + choice])
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        start = max(1, len(prompt))
        expected = sum(logprobs[at - 1, ids[0, at]] for at in range(start, ids.shape[1]))
        torch.testing.assert_close(score, torch.tensor(float(expected)), atol=1e-5, rtol=1e-5)


def test_the_likeliest_choice_is_the_answer_and_a_single_choice_is_always_right():
    model = tiny_model("gpt_oss")
    best = int(choice_scores(model, item()).argmax())
    asked = [item(answer=answer) for answer in range(3)] + [item(choices=((3,),))]
    assert answered_correctly(model, asked) == [answer == best for answer in range(3)] + [True]
