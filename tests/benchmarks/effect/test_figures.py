"""Means, intervals and fronts."""

import dataclasses

import pytest
import torch

from benchmarks.effect.figures import Point, compared_kinds, front, fronts, points, pooled, rounded
from benchmarks.effect.settings import BOTH, COMPETITORS, REFERENCE_COUNTS
from knnmoe_hf.evaluation import Change, Scores, paired_bootstrap

NOTHING = Change(0.0, 0.0, 0.0)


def scores(nll: list[float], hits: list[int] | None = None) -> Scores:
    values = torch.tensor(nll, dtype=torch.float64)
    right = torch.tensor(hits or [0] * len(nll), dtype=torch.float64)
    return Scores(values, right, torch.full_like(values, 10))


def point(name: str, gain: float, harm: float, nbytes: float = 1, group: str = "rows") -> Point:
    return Point(
        name, group, Change(-gain, 0, 0), NOTHING, Change(harm, 0, 0), NOTHING, NOTHING, "", nbytes, 1.0, 1, True
    )


def entry(own: dict[str, Scores], **more) -> dict:
    found = {"group": "rows", "bytes": 10, "build_seconds": 2.0, "keeps": True} | more
    return found | {"scores": {text: rounded(s) for text, s in own.items()}}


def test_one_text_is_the_paired_bootstrap():
    generator = torch.Generator().manual_seed(0)
    base, after = (scores((20 + torch.rand(30, generator=generator)).tolist()) for _ in range(2))
    change = torch.stack([after.nll - base.nll, after.hits - base.hits, after.tokens])
    found, known = pooled({("topics", "topics"): change}, 0), paired_bootstrap(base, after)
    assert dataclasses.astuple(found) == pytest.approx(dataclasses.astuple(known))


def test_texts_count_alike_and_a_text_that_comes_twice_is_resampled_once():
    one, other = (torch.tensor([[step] * 6, [0] * 6, [10] * 6], dtype=torch.float64) for step in (1.0, 3.0))
    found = pooled({("topics", "python"): one, ("headers", "tables"): other}, 0)
    assert dataclasses.astuple(found) == pytest.approx((0.2, 0.2, 0.2, 12))
    wavering = torch.tensor([[-1.0, 1.0] * 3, [0] * 6, [10] * 6], dtype=torch.float64)
    contrary = wavering * torch.tensor([[-1.0], [1.0], [1.0]])
    twice = pooled({("topics", "python"): wavering, ("headers", "python"): contrary}, 0)
    assert dataclasses.astuple(twice) == pytest.approx((0, 0, 0, 6))


def test_there_is_no_interval_if_any_text_has_fewer_than_five_windows():
    few, many = (torch.tensor([[1.0] * n, [0] * n, [10] * n], dtype=torch.float64) for n in (4, 9))
    assert pooled({("topics", "python"): few, ("topics", "tables"): many}, 0).low is None
    assert pooled({("topics", "tables"): many}, 0).low == pytest.approx(0.1)


def test_a_point_averages_seeds_by_window_and_kinds_by_text():
    base = {"topics": rounded(scores([20.0, 40.0])), "python": rounded(scores([20.0]))}
    cells = {
        ("lab", "topics", seed): {
            "base": base,
            "settings": {"s": entry({"topics": scores([20.0 - gain, 40.0]), "python": scores([25.0])})},
        }
        for seed, gain in ((0, 2.0), (1, 4.0))
    }
    cells["other", "topics", 0] = cells["lab", "topics", 0]
    (found,) = points(cells, "lab", ["topics"])
    assert found.gain == pytest.approx(3 / 20) and found.cells == 2
    assert found.harm == pytest.approx(5 / 10)
    assert found.worst_text == "python after topics" and found.worst.mean == found.harm
    (alone,) = points(cells, "lab", ["topics"], [1])
    assert alone.gain == pytest.approx(4 / 20) and alone.cells == 1
    assert points(cells, "lab", ["headers"]) == []


def test_the_front_has_what_nothing_beats():
    found = [point("a", 0.1, 0.0), point("b", 0.2, 0.01), point("c", 0.15, 0.01), point("d", 0.2, 0.02)]
    assert [p.name for p in front(found, "harm")] == ["a", "b"]
    assert front([], "harm") == []


def test_costs_that_cannot_be_told_apart_are_the_same():
    found = [point("a", 0.1, 0.00001, nbytes=1001), point("b", 0.2, 0.00002, nbytes=1002)]
    assert [[p.name for p in front(found, cost)] for cost in ("harm", "nbytes")] == [["b"], ["b"]]


def test_fronts_are_among_memories_and_the_last_with_competitors():
    found = [
        point("small", 0.1, 0.02, nbytes=1),
        point("safe", 0.2, 0.01, nbytes=5),
        point("beaten", 0.05, 0.03, nbytes=7),
        point("rival", 0.5, 0.01, group=COMPETITORS),
        point("more references", 0.9, 0.0, group=REFERENCE_COUNTS),
    ]
    on = fronts(found)
    assert on["safe"] == ["harm", "bytes", "seconds"] and on["small"] == ["bytes"]
    assert on["rival"] == ["all"] and not on["beaten"] and "more references" not in on


def test_labs_are_compared_on_the_kinds_that_all_of_them_have():
    def cell(*names: str) -> dict:
        return {"base": {}, "settings": dict.fromkeys(names, {})}

    cells = {("one", kind, 0): cell(BOTH.name) for kind in ("topics", "headers")}
    cells |= {("two", "topics", 0): cell(BOTH.name), ("two", "headers", 0): cell("router-only")}
    assert compared_kinds(cells, ["one", "two"]) == ["topics"]
    assert compared_kinds(cells, ["one"]) == ["topics", "headers"]
    assert compared_kinds({("one", "topics", 0): cell("router-only")}, ["one"]) == ["topics"]
