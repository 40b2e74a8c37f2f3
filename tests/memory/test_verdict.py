"""The verdict: three sentences that are true of every combination of what was measured, its numbers, its JSON."""

import copy
import itertools
import json
import re
from dataclasses import asdict, replace

import pytest

from knnmoe_hf import RoutingMemory
from knnmoe_hf.memory.verdict import OUTCOMES, NllChange, Verdict
from tests.memory.helpers import full_memory, read_config, write_config
from tests.support.models import tiny_model


def change(mean: float, half: float | None = 0.01, windows: int = 16, source: str | None = None) -> NllChange:
    bounds = (None, None) if half is None else (mean - half, mean + half)
    return NllChange(mean, *bounds, windows, source)


def verdict(**given) -> Verdict:
    """Of a memory that helps, and costs nothing elsewhere."""
    elsewhere = {
        "python": change(0.001, 0.003, source="this machine"),
        "notices": change(-0.001, source="this machine"),
    }
    known = dict(examples=128, tokens=128 * 255, repeated=0, gain=change(-0.12), open_gain=change(-0.15))
    return Verdict(**(known | dict(elsewhere=elsewhere, confidence="calibrated") | given))


GAINS = {
    "none": None,
    "few": change(-0.2, None, 4),
    "gain": change(-0.12),
    "harm": change(0.12),
    "unclear": change(-0.01, 0.02),
    "unclear harm": change(0.01, 0.02),
    "zero": change(0.0, 0.01),
    "exactly zero": change(0.0, 0.0),
}
COSTS = {
    "not measured": {},
    "small": {"law": change(0.002, 0.003, source="given")},
    "few windows": {"law": change(0.002, None, 3, "given")},
    "large": {"law": change(0.05, 0.01, source="given"), "python": change(-0.1, source="this machine")},
    "uncertain": {"law": change(0.004, 0.05, source="given")},
    "large, uncertain": {"law": change(0.05, 0.06, source="given")},
    "helps there": {"law": change(-0.2, source="given"), "python": change(-0.1, source="this machine")},
    "nothing": {"law": change(0.0, 0.0, source="given")},
    "many": {f"kind {i}": change(0.0001 * i, source="given") for i in range(8)},
}
COMBINATIONS = [
    dict(gain=gain, open_gain=gain and change(opened, gain.high and 0.01, gain.windows), elsewhere=cost) | more
    for gain, cost, opened, more in itertools.product(
        GAINS.values(),
        COSTS.values(),
        (-0.3, 0.2, 0.0),
        (
            dict(),
            dict(confidence="rbf"),
            dict(confidence="context", fallback="there is no background text to calibrate by"),
            dict(examples=24, tokens=24 * 50, repeated=2),
            dict(examples=0, tokens=0),
        ),
    )
]


def test_every_combination_gives_three_sentences_that_agree_with_its_numbers():
    for given in COMBINATIONS:
        found = verdict(**given)
        said = found.sentences()
        assert len(said) == 3, given
        for sentence in said:
            assert sentence.endswith(".") and not re.search(r"\. |\n|None|nan| ,|  ", sentence), sentence
            assert sentence[0].isupper(), sentence
        text, outcome = " ".join(said), found.outcome
        assert outcome in OUTCOMES
        assert ("The memory helps" in text, "The memory harms" in text) == (outcome == "helps", outcome == "harms")
        assert ("does nothing" in text, "too few references" in text) == (
            outcome == "does nothing",
            outcome == "too few references",
        )
        assert (
            ("you may leave it on" in text) == found.may_be_left_on == (outcome == "helps" and found.tolerable is True)
        )
        assert bool(re.search("leave it (on|off)", said[1])), said[1]  # the question is always answered
        if found.references_needed is not None:
            assert f"{found.references_needed:,}" in said[2]
            assert found.references_needed > found.examples or found.repeated or found.gain is None, given
        assert (found.fallback is not None) == ("fell back" in text)
        assert ("was not measured" in said[1]) == (not found.elsewhere)
        for kind in list(found.elsewhere) if len(found.elsewhere) < 5 else ():
            assert kind in said[1]


@pytest.mark.parametrize(
    "gain, examples, outcome",
    [
        (None, 5, "too few references"),
        (change(-3.0, None, 4), 1000, "too few references"),  # four windows tell nothing, however large the gain
        (change(-0.12), 12, "helps"),
        (change(-0.01, 0.0099), 128, "helps"),
        (change(-0.01, 0.0101), 128, "does nothing"),
        (change(-0.01, 0.0101), 63, "too few references"),
        (change(0.0, 0.0), 128, "does nothing"),
        (change(0.01, 0.0101), 128, "does nothing"),
        (change(0.01, 0.0099), 128, "harms"),
    ],
)
def test_the_outcome_is_what_the_interval_says(gain, examples, outcome):
    found = verdict(gain=gain, open_gain=gain, examples=examples, tokens=examples * 256)
    assert found.outcome == outcome
    helps = {"helps": 1.0, "harms": -1.0}.get(outcome, 0.0)
    metrics = found.metrics()
    assert (metrics["verdict_helps"], metrics["verdict_too_few"]) == (helps, float(outcome == "too few references"))


def test_the_number_of_references_that_would_do_is_of_their_tokens_and_of_the_interval():
    none = dict(gain=None, open_gain=None)
    assert verdict(examples=5, tokens=5 * 255, **none).references_needed == 64
    assert verdict(examples=5, tokens=5 * 1023, **none).references_needed == 64
    assert verdict(examples=5, tokens=5 * 51, **none).references_needed == 320
    assert verdict(examples=0, tokens=0, **none).references_needed == 64
    unclear = change(-0.01, 0.02)  # of 16 windows: an interval of half the width takes four times as many
    assert verdict(gain=unclear, open_gain=unclear).windows_needed == 64
    assert verdict(gain=unclear, open_gain=unclear).references_needed == 512
    hopeless = change(-0.001, 0.02)
    assert verdict(gain=hopeless, open_gain=hopeless).references_needed is None
    assert "not likely to change it" in verdict(gain=hopeless, open_gain=hopeless).sentences()[2]
    assert verdict(gain=change(0.0), open_gain=change(0.0)).references_needed is None
    assert verdict().references_needed is None  # as it helps already
    tiny = change(-1e-300, 0.02)
    assert verdict(gain=tiny, open_gain=tiny).references_needed is None


def test_what_the_confidence_keeps_is_a_share_of_a_gain_and_of_nothing_else():
    assert verdict().kept == pytest.approx(0.8) and "keeps 80 % of the 0.1500" in verdict().sentences()[0]
    for wide_open in (0.0, 0.2):
        found = verdict(open_gain=change(wide_open))
        assert found.kept is None and "verdict_kept" not in found.metrics()
        assert "no gain to keep" in found.sentences()[0]
    assert "keeps nothing" in verdict(gain=change(0.01, 0.02)).sentences()[0]
    assert "keeps more than all of the 0.1500" in verdict(gain=change(-0.18)).sentences()[0]
    assert "holds nothing of it back" in verdict(confidence="rbf").sentences()[0]


def test_the_worst_kind_is_named_with_its_interval_and_where_its_text_came_from():
    said = verdict(elsewhere=COSTS["large"]).sentences()
    cost = "costs 0.0500 nats per token [95 %: 0.0400 to 0.0600] at worst"
    assert f"{cost} (law, 16 windows of text that was given" in said[1]
    assert "do not leave it on" in said[1] and "Ordinary text of your own" in said[2]
    one_of_many = {"a": change(0.0, source="given"), "b": change(0.009, 0.0005, source="given")}
    assert verdict(elsewhere=one_of_many).tolerable is False
    said = verdict().sentences()
    assert "python, 16 windows of text found on its maker's machine; notices -0.0010" in said[1]
    assert "about software" in said[2]


def test_the_worst_of_equals_is_the_same_in_any_order():
    kinds = {name: change(0.001, source="given") for name in ("b", "a", "c")}
    found = [verdict(elsewhere={name: kinds[name] for name in order}) for order in itertools.permutations(kinds)]
    assert {one.worst[0] for one in found} == {"a"} and len({one.sentences()[1] for one in found}) == 1


def test_gains_are_told_in_nats_and_perplexity():
    gain = "falls by 0.1200 nats per token [95 %: 0.1100 to 0.1300], which is 11.3 % lower perplexity"
    assert gain in verdict().sentences()[0]
    assert "12.7 % higher perplexity" in verdict(gain=change(0.12)).sentences()[0]


def test_metrics_are_the_numbers_that_were_measured():
    found = verdict()
    metrics = found.metrics()
    assert all(type(value) is float for value in metrics.values())
    assert (metrics["verdict_gain"], metrics["verdict_open_gain"]) == (0.12, 0.15)
    assert metrics["verdict_gain_low"] == pytest.approx(0.11) and metrics["verdict_gain_high"] == pytest.approx(0.13)
    assert metrics["verdict_cost_python"] == 0.001 and metrics["verdict_cost_python_high"] == 0.004
    assert metrics["verdict_windows"] == 16 and metrics["verdict_may_be_left_on"] == 1
    bare = verdict(gain=None, open_gain=None, elsewhere={}).metrics()
    assert bare["verdict_windows"] == 0 and not any(name.startswith(("verdict_gain", "verdict_cost")) for name in bare)


def test_json_gives_the_same_verdict():
    for given in COMBINATIONS:
        found = verdict(**given)
        assert Verdict.of_json(json.loads(json.dumps(asdict(found)))) == found


def places(value, path=()):
    yield path
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from places(item, (*path, key))


@pytest.mark.parametrize("value", [None, -1, "x", [], {}, True, float("nan"), 2**70, 1e300], ids=str)
def test_other_json_is_refused_in_one_line_or_gives_true_sentences(value):
    original = asdict(verdict(settings={"gamma": 0.3, "confidence": "calibrated"}))
    taken = set()
    for path in list(places(original))[1:]:
        content = inner = copy.deepcopy(original)
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        try:
            found = Verdict.of_json(content)
        except (TypeError, ValueError, AttributeError) as error:
            assert "\n" not in str(error)
        else:
            taken.add(".".join(path))
            assert len(found.sentences()) == 3 and found.metrics()
    free = {"settings.gamma", "settings.confidence"}  # with other settings a verdict is dropped
    numbers = {name for name in taken if name.endswith((".mean", ".low", ".high"))}
    allowed = {
        "None": {"fallback", "gain.source", "open_gain.source"},
        "x": {"fallback"},
        "{}": {"elsewhere", "settings"},
        str(2**70): {"examples", "tokens", "repeated"} | {name for name in taken if name.endswith(".windows")},
        "1e+300": numbers,
    }
    assert taken <= allowed.get(str(value), set()) | free, taken


def test_a_missing_or_unknown_entry_is_refused():
    entry = asdict(verdict())
    for name in entry:
        with pytest.raises(ValueError, match="not the entries of a Verdict"):
            Verdict.of_json({key: value for key, value in entry.items() if key != name})
    with pytest.raises(ValueError, match="not the entries of a Verdict"):
        Verdict.of_json(entry | {"more": 1})


# in a memory


@pytest.fixture(scope="module")
def judged() -> RoutingMemory:
    memory = full_memory(tiny_model("olmoe"), examples=tuple(range(9)), confidence="context")
    settings = {"confidence": "context", "gamma": memory.config.gamma, "layers": [0, 1]}
    return replace(memory, verdict=verdict(settings=settings))


def test_it_is_saved_with_the_memory_and_its_sentences_lead_the_card(judged, tmp_path):
    judged.save_pretrained(tmp_path)
    assert (
        RoutingMemory.from_pretrained(tmp_path).verdict == judged.verdict == verdict(settings=judged.verdict.settings)
    )
    card = (tmp_path / "README.md").read_text()
    said = judged.verdict.sentences()
    places = [card.index(text) for text in ("# Routing memory", *said, "reference tokens of")]
    assert places == sorted(places)
    assert "NLL, frozen" not in card and f"{judged.provenance.nll_after.mean():.3f}" not in card
    assert replace(judged).verdict == copy.deepcopy(judged).verdict == judged.verdict


def test_a_memory_without_a_verdict_says_so_in_its_card(judged, tmp_path):
    replace(judged, verdict=None).save_pretrained(tmp_path)
    assert RoutingMemory.from_pretrained(tmp_path).verdict is None
    assert "Whether this memory helps was not measured" in (tmp_path / "README.md").read_text()


def test_an_entry_that_is_missing_is_no_verdict(judged, tmp_path):
    """As in a memory of an older version."""
    judged.save_pretrained(tmp_path)
    original = read_config(tmp_path)
    content = copy.deepcopy(original)
    del content["memory"]["verdict"]
    write_config(tmp_path, content, original)
    assert RoutingMemory.from_pretrained(tmp_path).verdict is None


@pytest.mark.parametrize(
    "edit",
    [
        lambda memory: memory.remove_examples([0]),
        lambda memory: memory.select_rows(max_rows=50),
        lambda memory: memory.take(memory.provenance.example_ids > 2),
        lambda memory: memory.merge(full_memory(tiny_model("olmoe"), examples=(20, 21), seed=4, confidence="context")),
        lambda memory: memory.recoded(tiny_model("olmoe"), key_dim=4),
    ],
    ids=["remove_examples", "select_rows", "take", "merge", "recoded"],
)
def test_edited_rows_are_not_what_was_measured(judged, edit):
    assert edit(judged).verdict is None and judged.verdict is not None


def test_other_options_are_not_what_was_measured(judged, tmp_path):
    judged.save_pretrained(tmp_path / "same")
    for options in (dict(confidence="rbf"), dict(gamma=7.0), dict(layers=[1])):
        assert RoutingMemory.from_pretrained(tmp_path / "same", **options).verdict is None
    assert RoutingMemory.from_pretrained(tmp_path / "same", search_backend="torch").verdict == judged.verdict
    changed = copy.deepcopy(judged)
    changed.config.gamma = 7.0
    changed.save_pretrained(tmp_path / "changed")
    assert RoutingMemory.from_pretrained(tmp_path / "changed").verdict is None
    assert "was not measured" in (tmp_path / "changed" / "README.md").read_text()
