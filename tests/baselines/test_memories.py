"""The library's own memory behind the interface of methods."""

import pytest
import torch

from knnmoe_hf import attach_override
from knnmoe_hf.baselines import make_method
from knnmoe_hf.models.attach import active_memory
from knnmoe_hf.models.hooks import RoutingHooks
from tests.baselines.items import logits_of, random_items
from tests.support.models import FAMILIES, tiny_model

QUICK = {"builder_steps": 2}
RAW = {"key_codec": "raw", "key_dtype": "float32", "value_dtype": "float32", "value_experts": None}
METHODS = ("knn_moe", "knn_moe_both", "knn_lm")
ROWS = sum(len(item.tokens) - 1 for item in random_items())  # every token that has a next one


def fitted(name: str, model, **options):
    method = make_method(name, build=QUICK, **options)
    method.fit(model, random_items())
    return method


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", METHODS)
def test_it_stores_every_token_and_leaves_the_model_as_it_was(name, family):
    model, test = tiny_model(family), random_items(seed=1)[0].tokens
    before = logits_of(model, test)[0]
    method = fitted(name, model)
    assert len(method.memory) == ROWS and RoutingHooks.of(model) is None
    with method.apply(model) as adapted:
        assert not torch.allclose(logits_of(adapted, test)[0], before, atol=1e-3)
    assert torch.equal(logits_of(model, test)[0], before)
    with pytest.raises(KeyError), method.apply(model):
        raise KeyError
    assert torch.equal(logits_of(model, test)[0], before) and RoutingHooks.of(model) is None


def test_what_is_attached_to_the_model_stays_attached():
    model = tiny_model("olmoe")
    attach_override(model, {0: lambda x, output, tokens: None}, "mine")
    method = fitted("knn_moe", model)
    assert active_memory(model) == "mine"
    with method.apply(model):
        pass
    assert active_memory(model) == "mine"


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("knn_moe", {"recall": "both"}),
        ("knn_moe_both", {"recall": "routing"}),
        ("knn_lm", {"recall": "both"}),
        ("knn_lm", {"confidence": "context"}),
        ("knn_lm", {"gamma": 1.0}),
        ("knn_lm", {"next_token_weight": 0.5}),
    ],
)
def test_an_option_that_the_method_decides_is_refused(name, option):
    (given,) = option
    with pytest.raises(ValueError, match=f"{given}=.* has no effect in the config of"):
        make_method(name, config=option)
    if given != "recall":
        assert make_method(name, config=option, weight=None).config == option


def test_a_weight_that_no_memory_takes_is_refused_before_a_fit():
    with pytest.raises(ValueError, match="next_token_weight=1.5"):
        make_method("knn_lm", weight=1.5)


@pytest.mark.parametrize("name", METHODS)
def test_one_build_serves_all(name, tmp_path):
    model, test = tiny_model("qwen3_moe"), random_items(seed=1)[0].tokens
    built, other = fitted("knn_moe", model), make_method(name, build=QUICK)
    assert other.fit_key == built.fit_key
    assert make_method(name, build=QUICK, config={"num_neighbors": 4}).fit_key != built.fit_key
    assert make_method(name, build={"builder_steps": 3}).fit_key != built.fit_key
    built.save(tmp_path / "memory")
    other.load(model, random_items(), tmp_path / "memory")
    own = fitted(name, model)
    with other.apply(model):
        loaded = logits_of(model, test)[0]
    with own.apply(model):
        assert torch.equal(logits_of(model, test)[0], loaded)
    assert other.nbytes == own.nbytes


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_knn_lm_gives_one_weight_to_every_token(family):
    """With one neighbour, p = 0.75 p_model + 0.25 on the token that followed it, however far it is."""
    model, known, unknown = tiny_model(family), random_items()[1].tokens, random_items(seed=1)[1].tokens
    method = fitted("knn_lm", model, config=RAW | {"next_token_neighbors": 1})
    own = [logits.softmax(-1) for logits in logits_of(model, known, unknown)]
    with method.apply(model):
        recalled = [logits.softmax(-1) - 0.75 * own for logits, own in zip(logits_of(model, known, unknown), own)]
    for given in recalled:
        torch.testing.assert_close(given.max(-1).values, torch.full([len(given)], 0.25), atol=1e-5, rtol=0)
        torch.testing.assert_close(given.sum(-1), torch.full([len(given)], 0.25), atol=1e-5, rtol=0)
    assert recalled[0].argmax(-1).tolist()[:-1] == list(known[1:])


def test_the_weight_may_be_left_to_the_calibration():
    plain, calibrated = make_method("knn_lm"), make_method("knn_lm", weight=None)
    assert plain.fit_key == calibrated.fit_key
    model = tiny_model("olmoe")
    config = fitted("knn_lm", model, weight=None).memory.config
    assert (config.recall, config.confidence, config.next_token_weight) == ("next_tokens", "calibrated", None)


def test_each_ships_what_it_uses():
    model = tiny_model("olmoe")
    routing, both, tokens = (fitted(name, model, config=RAW) for name in METHODS)
    values, keys, sample = ROWS * 8 * 4, ROWS * 32 * 4, routing.memory.layers[0].distances.nbytes
    assert routing.nbytes == 2 * (keys + values + sample)
    assert both.nbytes == routing.nbytes + ROWS * 4
    assert tokens.nbytes == keys + sample + ROWS * 4


def test_a_fit_takes_the_builders_steps_and_a_calibration():
    assert make_method("knn_moe").fit_passes == 14 and make_method("knn_moe", build=QUICK).fit_passes == 6


def test_bad_options_and_no_references_are_refused():
    with pytest.raises(ValueError, match="num_neighbors=0"):
        make_method("knn_moe", config={"num_neighbors": 0})
    with pytest.raises(ValueError, match="at least one reference"):
        make_method("knn_moe").fit(tiny_model("olmoe"), [])
    with (
        pytest.raises(ValueError, match="KNNLM has not been fitted"),
        make_method("knn_lm").apply(tiny_model("olmoe")),
    ):
        pass
