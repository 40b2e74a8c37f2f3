"""Examples before the question: which, in what order, and how many fit."""

import pytest
import torch
from torch.nn import functional as F

from knnmoe_hf.baselines import Cost, make_method
from knnmoe_hf.baselines.neighborhoods import read_prompts
from tests.baselines.items import logits_of, random_items
from tests.support.models import FAMILIES, tiny_model
from tests.support.tokenizers import byte_tokenizer

METHODS = ("in_context_fixed", "in_context_retrieved")
TOKENIZER = byte_tokenizer()
BREAK = tuple(TOKENIZER("\n\n", add_special_tokens=False)["input_ids"])
REFERENCES = random_items(count=8)
QUESTION = random_items(seed=1)[0].prompt


def small_model(family: str = "olmoe", **options):
    return tiny_model(family, vocab_size=257, **options)


def fitted(name: str, model, seed: int = 0, **options):
    method = make_method(name, **options)
    method.fit(model, REFERENCES, seed, TOKENIZER)
    return method


def taken(tokens: tuple[int, ...]) -> list[int]:
    """Numbers of the references that these tokens are, each followed by an empty line."""
    found = []
    while tokens:
        number = next(i for i, one in enumerate(REFERENCES) if tokens[: len(one.tokens) + 2] == one.tokens + BREAK)
        found.append(number)
        tokens = tokens[len(REFERENCES[number].tokens) + 2 :]
    return found


def test_fixed_examples_are_drawn_once_by_the_seed():
    model = small_model()
    drawn = [taken(fitted("in_context_fixed", model, seed).prepend(QUESTION)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(numbers)) == 5 for numbers in drawn)
    other = random_items(seed=2)[0].prompt
    assert taken(fitted("in_context_fixed", model).prepend(other)) == drawn[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_retrieved_examples_are_the_nearest_with_the_nearest_last(family):
    model = small_model(family)
    embeddings, _ = read_prompts(model, [*(item.prompt.tokens for item in REFERENCES), QUESTION.tokens])
    centred = F.normalize(embeddings - embeddings[:-1].mean(0), dim=-1)
    nearest = (centred[:-1] @ centred[-1]).topk(3).indices.tolist()
    assert taken(fitted("in_context_retrieved", model, examples=3).prepend(QUESTION)) == nearest[::-1]


@pytest.mark.parametrize("name", METHODS)
def test_examples_that_do_not_fit_are_left_out_whole(name):
    roomy = taken(fitted(name, small_model(), examples=3).prepend(QUESTION))
    lengths = {number: len(REFERENCES[number].tokens) + 2 for number in roomy}
    kept = roomy[:2] if name == "in_context_fixed" else roomy[1:]
    exact = len(QUESTION.tokens) + 2 + sum(lengths[number] for number in kept)  # the longest choice has two tokens
    for size, expected in ((exact, kept), (exact - 1, kept[:1] if name == "in_context_fixed" else kept[1:])):
        tight = small_model(max_position_embeddings=size)
        assert taken(fitted(name, tight, examples=3).prepend(QUESTION)) == expected


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_itself_stays_the_frozen_one(name, family):
    model = small_model(family)
    method, before = fitted(name, model), logits_of(model, QUESTION.tokens)[0]
    with method.apply(model, QUESTION):
        assert torch.equal(logits_of(model, QUESTION.tokens)[0], before)
        longer = logits_of(model, method.prepend(QUESTION) + QUESTION.tokens)[0]
    assert not torch.allclose(longer[-1], before[-1], atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_cost_and_bytes_are_those_of_the_examples(name):
    model = small_model()
    method, passes = fitted(name, model, examples=3), []
    handle = model.model.register_forward_pre_hook(lambda *_: passes.append(1))
    tokens = method.prepend(QUESTION)
    handle.remove()
    assert len(passes) == method.cost.forward
    lengths = [len(item.tokens) + 2 for item in REFERENCES]
    mean = 3 * sum(lengths) / len(lengths)
    assert make_method(name).cost == Cost(forward=len(passes))  # of no examples yet
    assert method.cost.prompt_tokens == (len(tokens) if name == "in_context_fixed" else mean)
    found = 3 * 8 if name == "in_context_fixed" else len(REFERENCES) * 32 * 4
    at_hand = len(tokens) if name == "in_context_fixed" else sum(lengths)
    assert method.nbytes == 4 * at_hand + found + 2 * 8


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_is_saved_and_loaded(name, tmp_path):
    model = small_model()
    method, other = fitted(name, model, seed=4), make_method(name)
    method.save(tmp_path / "fit")
    other.load(model, REFERENCES, tmp_path / "fit")
    assert other.prepend(QUESTION) == method.prepend(QUESTION)


@pytest.mark.parametrize("name", METHODS)
def test_a_missing_fit_tokenizer_or_reference_is_refused(name):
    with pytest.raises(ValueError, match="9 examples need as many references, and there are 8"):
        fitted(name, small_model(), examples=9)
    with pytest.raises(ValueError, match="pass one"):
        make_method(name).fit(small_model(), REFERENCES)
    with pytest.raises(ValueError, match="has not been fitted"):
        make_method(name).prepend(QUESTION)
