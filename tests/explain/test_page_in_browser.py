"""The page of a trace in a real browser: what is shown are the trace's figures, and every control has its key."""

import re
from pathlib import Path

import pytest

from knnmoe_hf.explain.page import to_html
from tests.explain.pages import HARD, lab_trace
from tests.support.browser import THEMES, WIDTHS, complaints, looked_at, needs_browser

pytestmark = needs_browser
CHOSEN = 20
LOOKING = Path(__file__).with_name("look.js").read_text().replace("CHOSEN", str(CHOSEN))


@pytest.fixture(scope="module")
def trace():
    return lab_trace(recall="both")


@pytest.fixture(scope="module", params=THEMES)
def looked(request, trace, tmp_path_factory) -> tuple[str, dict, str]:
    """The theme, what the page said of itself by width, and what the browser logged."""
    page = tmp_path_factory.mktemp("page") / "explanation.html"
    page.write_text(to_html(trace))
    return request.param, *looked_at(page, LOOKING, request.param, tmp_path_factory.mktemp("profile"))


@pytest.fixture(params=WIDTHS)
def found(request, looked) -> dict:
    page = looked[1][str(request.param)]
    assert "error" not in page, page
    return page


def test_the_page_fits_its_window_and_nothing_covers_anything(found):
    assert found["sideways"] <= 0 and found["outside"] == 0
    assert found["covered"] == []
    assert found["small"] == 0  # of what is pressed with a finger


def test_tokens_are_reached_and_chosen_by_keys(found):
    assert found["reachable"] == 1 and found["moved"] == 1 and found["last"]
    assert found["inDetail"] and found["focused"] and found["returned"] == CHOSEN


def test_figures_that_are_shown_are_those_of_the_trace(trace, found):
    layers = list(trace.layers.values())
    assert found["confidences"] == [f"{one.confidence[CHOSEN]:.3f}" for one in layers]
    assert f"{trace.gain[CHOSEN]:+.3f} nats" in found["figures"]
    assert (
        f"{trace.log_prob[CHOSEN]:.3f} nats with the memory, {trace.base_log_prob[CHOSEN]:.3f} without"
        in found["figures"]
    )
    layer = layers[1]
    own = dict(zip(layer.own_experts[CHOSEN].tolist(), layer.own_weights[CHOSEN].tolist()))
    mixed = dict(zip(layer.mixed_experts[CHOSEN].tolist(), layer.mixed_weights[CHOSEN].tolist()))
    for shown, weights in ((found["before"], own), (found["after"], mixed)):
        assert len(shown) == len(own | mixed)
        assert sorted(float(one) for one in shown if one != "0.000") == pytest.approx(
            sorted(weight for weight in weights.values() if weight >= 0.0005), abs=0.0006
        )
    scale = trace.memory.layers[list(trace.layers)[1]].scale
    source = trace.memory.provenance
    for line, row, far, weight in zip(
        found["about"], layer.rows[CHOSEN].tolist(), layer.distances[CHOSEN].tolist(), layer.weights[CHOSEN].tolist()
    ):
        shown = re.fullmatch(
            r"weight ([\d.]+) % · distance ([\d.]+) · row (\d+) · example (\d+) · position (\d+)", line
        )
        assert float(shown[1]) == pytest.approx(100 * weight, abs=0.06)
        assert float(shown[2]) == pytest.approx(far / scale, abs=0.0006)
        assert [int(one) for one in shown.groups()[2:]] == [row, source.example_ids[row], source.positions[row]]
    assert len(found["about"]) == len(found["marks"]) == len(found["following"]) == layer.rows.shape[1]


def test_colours_and_legend_follow_the_choice(trace, found):
    titles = {what: title for what, (title, _, _) in found["colours"].items()}
    confidence = sum(one.confidence[CHOSEN].item() for one in trace.layers.values()) / len(trace.layers)
    assert titles["confidence"].endswith(f"confidence {confidence:.3f}")
    assert titles["gain"].endswith(f"{trace.gain[CHOSEN]:+.3f}")
    assert found["ofLayer"].endswith(f"confidence {list(trace.layers.values())[2].confidence[CHOSEN]:.3f}")
    assert len({legend for *_, legend in found["colours"].values()}) == 3


def test_text_is_shown_as_itself(found):
    text = "".join(found["shown"]).replace("↵", "").replace("⇥", "")
    assert text.startswith(HARD[: HARD.index("שלום")]) and found["elements"] == 0
    assert "\\u2028" in text or "E2" in text


def test_the_theme_is_that_of_the_system_until_another_is_chosen(looked, found):
    before, after = (sum(map(int, re.findall(r"\d+", colour))) for colour in found["grounds"])
    assert (before < 200) == (looked[0] == "dark") and (after < 200) == (looked[0] == "light")


def test_the_browser_complains_of_nothing(looked):
    assert complaints(looked[2]) == []
