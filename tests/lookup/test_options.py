"""`RetrievalOptions`: every value is checked, and errors are one sentence with the way out."""

import pytest

from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.mixing import SPACES
from knnmoe_hf.lookup.options import CHOICES, FIXED_AT_BUILD, OPTION_NAMES, VALUE_SPACES, RetrievalOptions
from knnmoe_hf.search import ENGINES
from knnmoe_hf.search.options import SEARCH_BACKENDS

BAD = [
    ("value_space", "routes", "assignment, logits, delta"),
    ("value_space", [], "assignment, logits, delta"),
    ("search_backend", "annoy", "auto, torch, ivf, hnsw, faiss"),
    ("key_dtype", "int4", "float32, bfloat16, float16, int8"),
    ("key_codec", "vae", "raw, pca, logits"),
    ("key_codec", None, "raw, pca, logits"),
    ("value_dtype", "bfloat16", "float32, float16, int8"),
    ("confidence", "always", "rbf, context, calibrated"),
    ("confidence", 1.0, "rbf, context, calibrated"),
    ("recall", "tokens", "routing, next_tokens, both"),
    ("recall", None, "routing, next_tokens, both"),
    ("next_token_weight", 1, "a number from 0 to below 1, or None"),
    ("next_token_weight", -0.1, "a number from 0 to below 1"),
    ("next_token_weight", float("nan"), "a number from 0 to below 1"),
    ("next_token_weight", True, "a number from 0 to below 1"),
    ("next_token_weight", "0.3", "a number from 0 to below 1"),
    ("next_token_temperature", 0, "a positive number below 2**63, or None"),
    ("next_token_temperature", float("inf"), "a positive number below 2**63"),
    ("next_token_temperature", float("nan"), "a positive number below 2**63"),
    ("next_token_neighbors", 0, "an integer of at least 1, below 2**63, or None"),
    ("next_token_neighbors", 2.0, "an integer of at least 1"),
    ("next_token_neighbors", 10**400, "an integer of at least 1"),
    ("num_neighbors", 0, "an integer of at least 1"),
    ("num_neighbors", 2.0, "an integer of at least 1"),
    ("num_neighbors", True, "an integer of at least 1"),
    ("num_neighbors", "x" * 500, "an integer of at least 1"),
    ("num_neighbors", 10**400, "below 2**63"),
    ("num_neighbors", 10**5000, "below 2**63"),
    ("temperature", 0, "a positive number"),
    ("temperature", -1.0, "a finite number of at least 0"),
    ("temperature", float("nan"), "a finite number"),
    ("temperature", float("inf"), "a finite number"),
    ("gamma", -0.1, "a finite number of at least 0"),
    ("gamma", float("inf"), "a finite number"),
    ("gamma", "1", "a finite number"),
    ("gamma", None, "a finite number"),
    ("half_life", 0, "a positive number"),
    ("half_life", -1, "a finite number of at least 0"),
    ("half_life", None, "a finite number"),
    ("context_threshold", -0.1, "a finite number of at least 0"),
    ("context_threshold", float("nan"), "a finite number"),
    ("context_width", 0.0, "a positive number"),
    ("context_width", "wide", "a finite number"),
    ("key_dim", 0, "an integer of at least 1"),
    ("key_dim", 48.0, "an integer of at least 1"),
    ("key_whitening", -0.5, "a finite number of at least 0"),
    ("key_whitening", 1.01, "a number from 0 to 1"),
    ("key_whitening", True, "a finite number"),
    ("value_experts", 0, "None for all"),
    ("value_experts", 2.0, "None for all"),
    ("value_experts", True, "None for all"),
    ("value_experts", "all", "None for all"),
    ("routing_width", "union", "value_space='assignment'"),
    ("routing_width", "all", "a positive integer, 'union', or None"),
    ("routing_width", 0, "a positive integer, 'union', or None"),
    ("routing_width", 1.5, "a positive integer, 'union', or None"),
    ("routing_width", True, "a positive integer, 'union', or None"),
    ("layers", [], "each layer's index once, or None"),
    ("layers", [0, 0], "each layer's index once, or None"),
    ("layers", [-1], "each layer's index once, or None"),
    ("layers", ["0"], "each layer's index once, or None"),
    ("layers", 3, "each layer's index once, or None"),
    ("search_max_bytes", 100, "an integer of at least 65536"),
    ("hnsw_m", 1, "an integer of at least 2"),
    ("hnsw_ef_construction", 0, "an integer of at least 1"),
    ("hnsw_ef_search", None, "an integer of at least 1"),
]


def test_every_allowed_extreme_is_taken():
    options = RetrievalOptions(
        value_space="assignment",
        routing_width="union",
        num_neighbors=1,
        temperature=1e-9,
        gamma=0,
        layers=[3, 1],
        half_life=1e-9,
        context_threshold=0,
        context_width=1e-9,
        next_token_weight=0,
        next_token_temperature=1e-9,
        next_token_neighbors=1,
        key_dim=1,
        key_whitening=1,
        value_experts=1,
        search_max_bytes=2**16,
        hnsw_m=2,
    )
    assert options.routing_width == "union" and options.layers == [3, 1] and options.gamma == 0


@pytest.mark.parametrize("name, value, allowed", BAD, ids=lambda value: shown(value)[:30])
def test_a_bad_value_is_refused_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError) as caught:
        RetrievalOptions(**{name: value})
    assert str(caught.value).startswith(f"{name}=") and allowed in str(caught.value)


@pytest.mark.parametrize("name, value", [(name, value) for name, allowed in CHOICES.items() for value in allowed])
def test_every_choice_is_allowed(name, value):
    assert getattr(RetrievalOptions(**{name: value}), name) == value


def test_options_cannot_be_changed_and_those_of_a_build_are_among_them():
    options = RetrievalOptions()
    with pytest.raises(AttributeError):
        options.gamma = 0.5
    assert options == RetrievalOptions(gamma=0.3) and set(FIXED_AT_BUILD) < set(OPTION_NAMES)


def test_the_names_of_choices_are_those_of_what_is_there():
    assert set(VALUE_SPACES) == set(SPACES)
    assert set(SEARCH_BACKENDS) - {"auto"} == set(ENGINES) - {"native_ivf"}
