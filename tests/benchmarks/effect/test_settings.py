"""The plan of the benchmark covers what the library offers."""

from benchmarks.effect.competitors import COMPETITORS, RATES
from benchmarks.effect.settings import (
    BOTH,
    COUNTED,
    DEFAULT,
    GRID_KIND,
    GRID_LAB,
    GROUPS,
    LABS,
    LORA_RATES,
    MAIN,
    PAPER,
    PLAIN,
    PLAIN_RAW,
    SEEDS,
    SEEDS_OF,
    TOKENS,
    grid,
    planned,
)
from benchmarks.texts import IN_DOMAIN
from knnmoe_hf.lookup.options import CHOICES
from knnmoe_hf.training.options import BUILDERS


def test_names_and_measurements_are_each_there_once():
    settings = grid()
    assert len({setting.name for setting in settings}) == len(settings)
    assert len({repr(setting.options()) for setting in settings}) == len(settings)


def test_every_choice_of_the_library_and_every_group_has_a_setting():
    assert {setting.group for setting in grid()} == set(GROUPS)
    options = [setting.options() for setting in grid() if setting.competitor is None]
    for name in ("confidence", "value_space", "key_codec", "key_dtype", "value_dtype", "recall"):
        assert {option["config"][name] for option in options} >= set(CHOICES[name]) - {"float16"}, name
    assert {option["build"]["builder"] for option in options} == set(BUILDERS)
    assert {setting.competitor for setting in grid()} - {None} == set(COMPETITORS)
    rates = {(setting.competitor, setting.rate) for setting in grid() if setting.rate is not None}
    assert rates == {(name, rate) for name, rates in RATES.items() for rate in rates}


def test_the_default_is_the_librarys_and_the_papers_forms_are_the_papers():
    assert DEFAULT.config == DEFAULT.build == {}
    for setting, space in zip(PAPER, ("assignment", "logits")):
        found = setting.options()
        assert found["build"]["builder"] == "topk"
        stored = {name: found["config"][name] for name in ("value_space", "confidence", "key_codec", "key_dtype")}
        assert stored == {"value_space": space, "confidence": "rbf", "key_codec": "raw", "key_dtype": "float32"}


def test_every_series_is_measured_on_all_labs_and_kinds_and_the_grid_on_one():
    assert set(SEEDS_OF) == set(IN_DOMAIN)
    assert all(setting in MAIN for setting in (DEFAULT, TOKENS, BOTH, *PLAIN, *PLAIN_RAW, *LORA_RATES))
    for lab in LABS:
        for kind, seeds in SEEDS_OF.items():
            assert seeds[0] == SEEDS[0]
            for seed in seeds:
                found, first = planned(lab, kind, seed), (kind, seed) == (GRID_KIND, SEEDS[0])
                whole = grid() if first and lab == GRID_LAB else (*MAIN, *COUNTED) if first else MAIN
                assert found == whole and found[: len(MAIN)] == MAIN


def test_plain_knn_lm_trusts_every_neighbour_alike():
    for setting in (*PLAIN, *PLAIN_RAW):
        found = setting.options()["config"]
        assert (found["recall"], found["confidence"], found["gamma"]) == ("next_tokens", "rbf", 0.0)
        assert found["next_token_weight"] == float(setting.name.rpartition(" ")[2])
    assert {setting.options()["config"]["next_token_neighbors"] for setting in PLAIN_RAW} == {256}
