"""The page on a memory: figures of what it was told, a word on what it lacks, and no markup from text."""

from dataclasses import replace

import pytest
import torch

from knnmoe_hf import RoutingMemory
from knnmoe_hf.calibration.sweep import sweep
from knnmoe_hf.explain.report.page import Report, document_of
from knnmoe_hf.memory.levels import at_level
from knnmoe_hf.pages.figures import Cloud, Curves, Heat
from knnmoe_hf.pages.page import to_html
from tests.explain.report.reports import SWEEP, lab_report
from tests.memory.helpers import full_memory, tiny_tokenizer
from tests.support.models import random_memory, tiny_model

PANELS = ["Does it help?", "Gain against harm", "Layers and experts that changed most", "Distance and confidence"]
PANELS += ["Rows and bytes", "References before and after", "A map of the keys", "Rows recalled most, and never"]
PANELS += ["Audit"]


@pytest.fixture(scope="module")
def report() -> Report:
    return lab_report()


@pytest.fixture(scope="module")
def page(report) -> str:
    return to_html(document_of(report))


@pytest.fixture(scope="module")
def alone() -> RoutingMemory:
    return full_memory(tiny_model("olmoe"), tokenizer=tiny_tokenizer())


def line(figure: Curves, name: str):
    (found,) = [one for one in figure.lines if one.name == name]
    return found


def test_all_panels_are_there_and_self_contained(page):
    places = [page.index(f"<h2>{panel}</h2>") for panel in PANELS]
    assert places == sorted(places)
    assert "http" not in page.replace("http-equiv", "") and page.count("<script") == 1
    assert 'name="generator" content="knnmoe_hf ' in page[:2048]  # by which a later command knows its own page


def test_text_and_names_are_no_markup(page):
    assert "the &lt;b&gt;domain&lt;/b&gt;" in page and "<b>" not in page and "alert(1)</script>" not in page
    assert "\ufffd" not in page  # a part of a letter is shown as its bytes
    assert "\u202e" not in page and "\u2028" not in page  # they would turn the text around them


def test_experts_that_change_are_those_of_the_text(report):
    for name, text in zip(("experts", "experts-other"), report.texts):
        heat = report.figures()[name]
        assert isinstance(heat, Heat) and heat.row_names == list(text.layers)
        for row, use in zip(heat.values, text.layers.values(), strict=True):
            torch.testing.assert_close(torch.tensor(row, dtype=torch.float64), use.mixed - use.own)


def test_the_sweep_is_that_of_the_calibration_and_of_the_texts(report):
    figure = report.figures()["sweep"]
    built = line(figure, "expected when it was calibrated")
    assert built.points == [(point.harm, point.gain) for point in SWEEP]
    assert line(figure, "its threshold").points == [(SWEEP[4].harm, SWEEP[4].gain)]
    domain, other = report.texts
    stats = {layer: rows.stats for layer, rows in report.memory.layers.items()}
    points = sweep(stats, domain.observation, {"other": other.observation})
    assert line(figure, "expected on the texts of this page").points == [(one.harm, one.gain) for one in points]
    own = next(one for one in points if one.threshold == 0.3)
    assert line(figure, "its threshold on these texts").points == [(own.harm, own.gain)]
    measured = (other.comparison.change().mean, -domain.comparison.change().mean)
    assert line(figure, "measured with the memory as it is").points == [measured]
    compared = [replace(text, observation=None) for text in report.texts]  # as of a quickstart
    figure = replace(report, texts=compared).figures()["sweep"]
    assert line(figure, "measured with the memory as it is").points == [measured]


def test_a_threshold_that_was_set_by_hand_is_marked_between_those_of_the_sweep(report):
    figure = replace(report, memory=report.memory.with_threshold(0.45), texts=()).figures()["sweep"]
    (spot,) = line(figure, "its threshold").points
    assert spot == pytest.approx(((SWEEP[4].harm + SWEEP[5].harm) / 2, (SWEEP[4].gain + SWEEP[5].gain) / 2))


def test_a_memory_without_a_calibration_is_swept_by_its_openness():
    figure = lab_report(is_calibrated=False).figures()["sweep"]
    points = line(figure, "open to a share of its similarity").points
    assert points[0] == (0.0, 0.0) and len(points) == 21
    assert "knnmoe adjust" not in to_html(document_of(lab_report(is_calibrated=False)))


def test_distances_are_counted_and_the_confidence_laid_over(report):
    layer = report.layer
    figure = report.figures()[f"distances-{layer}"]
    assert isinstance(figure, Curves)
    for name in ("references to one another", "text of the domain", "other text"):
        area = line(figure, name)
        assert area.style == "area" and max(y for _, y in area.points) == 1.0
    smooth = line(figure, "similarity of a neighbour, exp(-gamma d / s)")
    gamma = report.memory.config.gamma
    for x, y in smooth.points:
        assert y == pytest.approx(torch.exp(torch.tensor(-gamma * x)).item(), rel=1e-4)
    use = report.texts[0].layers[layer]
    seen = sum(
        int(said.split(": ")[1].split(" ")[0]) for said in line(figure, "confidence on text of the domain").told
    )
    assert len(use.confidence) - 20 <= seen <= len(use.confidence)


def test_rows_are_listed_by_how_much_they_are_recalled(report, page):
    total = sum(use.recalled for use in report.texts[0].layers.values())
    best, tokens = int(total.argmax()), sum(len(use.confidence) for use in report.texts[0].layers.values())
    never = int((total <= 1e-9).sum())
    assert f"{never:,} of 60 rows" in page
    assert f'data-value="{total[best].item() / tokens}"' in page


def test_dots_of_the_map_say_their_reference(alone):
    cloud = Report(alone, "m").figures()["keys"]
    assert isinstance(cloud, Cloud) and len(cloud.dots) == 40
    known = alone.provenance
    for row, dot in enumerate(cloud.dots):
        assert dot.told.startswith(f"row {row}, example {known.example_ids[row]}, position {known.positions[row]}")
        assert "⟦" in dot.told and dot.value == pytest.approx((known.nll_before - known.nll_after)[row].item())


def test_without_text_each_panel_says_what_it_lacks_and_how_to_get_it(alone):
    page = to_html(document_of(Report(alone, "my memory")))
    assert page.count("<code>knnmoe report &#39;my memory&#39; --dataset TEXT</code>") == 3
    assert page.count("--dataset TEXT --ordinary-dataset OTHER-TEXT</code>") == 2
    assert "was not measured when it was built" in page and "Nothing suspicious" in page


def test_what_is_missing_is_asked_for_beside_what_there_is(report):
    page = to_html(document_of(replace(report, texts=report.texts[:1])))
    assert page.count("--dataset TEXT --ordinary-dataset OTHER-TEXT</code>") == 2
    assert page.count("--dataset TEXT</code>") == 0


@pytest.mark.parametrize("level, said", [("ids", "position"), ("none", "row 0: no text")])
def test_a_memory_without_the_text_shows_what_remains(alone, level, said):
    figures = Report(at_level(alone, level), "m").figures()
    assert "references" not in figures and said in figures["keys"].dots[0].told
    assert "⟦" not in figures["keys"].dots[0].told
    assert "--save-provenance text has it" in to_html(document_of(Report(at_level(alone, level), "m")))


@pytest.mark.parametrize("space", ["assignment", "logits", "delta"])
@pytest.mark.parametrize("value_dtype", ["float32", "int8"])
def test_stored_values_are_shown_in_every_form(space, value_dtype):
    memory = random_memory(tiny_model("gpt_oss"), value_space=space, value_dtype=value_dtype)
    heat = Report(memory, "m").figures()["values"]
    for row, rows in zip(heat.values, memory.layers.values(), strict=True):
        mean = rows.decoded_values.double().mean(dim=0)
        expected = mean if space == "delta" else mean - mean.mean()
        torch.testing.assert_close(torch.tensor(row, dtype=torch.float64), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 2])
def test_memories_of_hardly_any_rows_have_a_page(rows):
    assert "A map of the keys" in to_html(document_of(Report(random_memory(tiny_model("olmoe"), rows=rows), "m")))


def test_what_cannot_be_shown_is_refused(alone):
    with pytest.raises(ValueError, match="layer 9 is not in this memory"):
        document_of(Report(alone, "m", map_layer=9))
    empty = alone.remove_examples([0, 1, 2, 3])
    with pytest.raises(ValueError, match="no rows"):
        document_of(Report(empty, "m"))


def test_a_suspicious_memory_is_named_so_at_the_top(alone):
    layer = alone.layers[0]
    values = layer.decoded_values.clone()
    values[:10] = 0.0
    values[:10, 3] = 1e4
    table = replace(layer.values, codes=values.to(layer.values.codes.dtype), experts=None, default_value=None)
    bad = replace(alone, layers=dict(alone.layers) | {0: replace(layer, values=table)})
    document = document_of(Report(bad, "m"))
    assert document.warnings and "knnmoe remove m --suspicious --output m-remove" in to_html(document)


def test_a_path_of_this_machine_is_not_on_the_page(report, page):
    assert str(report.memory.config.base_model_name_or_path) not in page
