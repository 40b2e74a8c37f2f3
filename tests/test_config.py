"""`KNNMoEConfig`: every value is checked, errors are one sentence, unknown options are refused."""

import pytest

from knnmoe_hf import KNNMoEConfig
from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.options import FIXED_AT_BUILD, OPTION_NAMES
from tests.lookup import test_options

BAD = [
    *test_options.BAD,
    ("base_model_name_or_path", 5, "a str or None"),
    ("base_model_revision", ["x"], "a str or None"),
    ("memory", "x", "a dict or None"),
]


@pytest.mark.parametrize("name, value, allowed", BAD, ids=lambda value: shown(value)[:30])
def test_a_bad_value_is_refused_in_one_sentence_that_names_it_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError) as caught:
        KNNMoEConfig(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={shown(value)}" if value != 0 else f"{name}=0")
    assert allowed in message
    assert "\n" not in message and len(message) < 300 and message.endswith(".")


@pytest.mark.parametrize("name, value", [case[:2] for case in BAD if case[0] in OPTION_NAMES], ids=shown)
def test_a_bad_value_that_is_set_later_is_refused_when_options_are_read(name, value):
    config = KNNMoEConfig()
    setattr(config, name, value)
    with pytest.raises(ValueError, match=name):
        config.retrieval_options()


def test_shown_cuts_to_80_characters_on_one_line():
    class Wordy:
        def __repr__(self):
            return "a\nb" * 100

    assert len(shown("x" * 500)) == 80 and shown("x" * 500).endswith("...")
    assert len(shown("x" * 78)) == 80 and "..." not in shown("x" * 78)
    assert "\n" not in shown(Wordy()) and len(shown(Wordy())) == 80
    assert "int" in shown(10**5000)


@pytest.mark.parametrize("name", ["neighbours", "num_labels", "torch_dtype", "k"])
def test_unknown_option_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"'{name}' is not an option of KNNMoEConfig: choose among .*value_space"):
        KNNMoEConfig(**{name: 1})


def test_round_trip_through_a_dict_and_what_is_saved_keeps_every_option():
    config = KNNMoEConfig(num_neighbors=3, gamma=0.5, layers=[1], key_dtype="float16", search_backend="hnsw")
    for name, value in dict(confidence="rbf", half_life=3, key_codec="logits", value_experts=4).items():
        setattr(config, name, value)
    for content in (config.to_dict(), config.saved()):
        assert KNNMoEConfig.from_dict(content).options() == config.options()
    assert config.saved()["model_type"] == "knn_moe"
    assert not set(config.saved()) & {"id2label", "architectures", "dtype"}


def test_from_dict_takes_its_own_options_and_hands_back_the_model_s():
    config, unused = KNNMoEConfig.from_dict(
        KNNMoEConfig().saved(), num_neighbors=5, attn_implementation="eager", return_unused_kwargs=True
    )
    assert config.num_neighbors == 5
    assert unused == {"attn_implementation": "eager"}


def test_options_are_all_fields_of_the_class_and_those_fixed_at_build_are_among_them():
    config = KNNMoEConfig()
    own = {name for name in KNNMoEConfig.__annotations__ if name not in vars(type(config).__mro__[1])}
    own -= {"base_model_name_or_path", "base_model_revision", "memory", "model_type"}
    assert set(config.options()) == own >= set(FIXED_AT_BUILD)
    changed = {"gamma", "half_life", "num_neighbors", "confidence", "temperature", "search_backend", "layers"}
    assert not changed & set(FIXED_AT_BUILD)


def test_defaults_are_the_ones_that_the_documents_name():
    wanted = dict(value_space="logits", num_neighbors=16, temperature=1.0, gamma=0.3, confidence="calibrated")
    wanted |= dict(half_life=24.0, key_codec="pca", key_dim=48, key_dtype="int8", value_dtype="int8")
    assert wanted.items() <= KNNMoEConfig().options().items()
