"""The picture beside a card: an SVG file that belongs to the memory as its card does."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from knnmoe_hf import RoutingMemory
from knnmoe_hf.memory.card.picture import picture
from knnmoe_hf.memory.measurements import ConfidenceBin, Measurements
from tests.memory.card.examples import MEASURED, memory
from tests.memory.helpers import contents, read_config

SVG = "{http://www.w3.org/2000/svg}"


def marks(text: str) -> list[str]:
    """What each mark of the picture tells when it is pointed at."""
    return [found.text for found in ElementTree.fromstring(text).iter(f"{SVG}title")][1:]


def test_each_group_of_tokens_is_a_mark_and_nothing_in_it_can_run():
    text = picture(memory())
    found = marks(text)
    assert found == [
        "60 tokens of confidence 0.200: gain +0.0100 nats per token",
        "61 tokens of confidence 0.700: gain +0.2000 nats per token",
        "50 tokens of confidence 0.100: gain -0.0020 nats per token",
    ]
    assert "held-out references (121 tokens)" in text and "background text (50 tokens)" in text
    names = {element.tag for element in ElementTree.fromstring(text).iter()}
    assert names <= {f"{SVG}{name}" for name in "svg title style rect line text g path polyline".split()}
    assert "href" not in text and " on" not in text.replace(" on ", "") and text == picture(memory())


@pytest.mark.parametrize(
    "measured",
    [
        replace(MEASURED, background=[]),
        replace(MEASURED, references=[]),
        replace(MEASURED, references=[ConfidenceBin(0.0, 0.0, 1)], background=[]),
        replace(MEASURED, references=[ConfidenceBin(1.0, 1e6, 10**9), ConfidenceBin(1.0, -1e-9, 1)]),
    ],
    ids=["no background", "no references", "nothing happens", "extremes"],
)
def test_every_mark_lies_within_the_picture(measured):
    root = ElementTree.fromstring(picture(memory(measured=measured)))
    width, height = float(root.get("width")), float(root.get("height"))
    for element in root.iter(f"{SVG}line"):
        assert all(0 <= float(element.get(name)) <= width for name in ("x1", "x2"))
        assert all(0 <= float(element.get(name)) <= height for name in ("y1", "y2"))
    for element in root.iter(f"{SVG}g"):
        x, y = map(float, element.get("transform").removeprefix("translate(").removesuffix(")").split(","))
        assert 0 < x < width and 0 < y < height


def test_without_measurements_there_is_none(tmp_path):
    assert picture(memory(measured=None)) is None and picture(memory(measured=Measurements())) is None
    memory(measured=None).save_pretrained(tmp_path)
    assert "card.svg" not in contents(tmp_path)


def test_it_belongs_to_the_memory_as_the_card_does(tmp_path):
    memory().save_pretrained(tmp_path)
    assert read_config(tmp_path)["memory"]["digests"]["card.svg"] == contents(tmp_path)["card.svg"]
    assert "](card.svg)" in (tmp_path / "README.md").read_text()
    RoutingMemory.from_pretrained(tmp_path).remove_examples([0]).save_pretrained(tmp_path)
    assert "card.svg" not in contents(tmp_path)  # it showed what the memory was before


@pytest.mark.parametrize("name", ["card.svg", "README.md"])
def test_a_file_of_the_users_is_not_written_over(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name} in .* was not written by an earlier save"):
        memory().save_pretrained(tmp_path)
    memory().save_pretrained(tmp_path, overwrite=True)
    (tmp_path / name).write_text("edited")
    with pytest.raises(FileExistsError, match=f"{name} in .* or edited since"):
        memory().save_pretrained(tmp_path)
