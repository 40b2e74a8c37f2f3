"""What a card says beside a memory's rows: it survives JSON, and what has another form is refused when it is made."""

import json
from dataclasses import replace

import pytest

from knnmoe_hf.memory.card_data import CardData
from knnmoe_hf.memory.measurements import ConfidenceBin, EvaluatedText, LayerConfidence, Measurements, printable
from tests.memory.card.examples import MEASURED, SAID


def test_it_survives_json():
    for said in (CardData(), SAID, replace(SAID, measured=Measurements())):
        assert CardData.of_json(json.loads(json.dumps(said.to_json()))) == said


@pytest.mark.parametrize(
    "edit",
    [
        lambda entry: entry.pop("license"),
        lambda entry: entry.update(more=1),
        lambda entry: entry.update(language="en"),
        lambda entry: entry.update(license="a\nb"),
        lambda entry: entry.update(tags=["x" * 301]),
        lambda entry: entry.update(build={"a": {}}),
        lambda entry: entry.update(build={"a": float("nan")}),
        lambda entry: entry.update(build=[]),
        lambda entry: entry.update(history=["a\nb"]),
        lambda entry: entry.update(history="edited"),
        lambda entry: entry.update(measured={}),
        lambda entry: entry["measured"].update(base_nll=float("inf")),
        lambda entry: entry["measured"].update(elsewhere_nll={"a": None}),
        lambda entry: entry["measured"]["layers"].append(entry["measured"]["layers"][0]),
        lambda entry: entry["measured"]["layers"][0].update(references=1.5),
        lambda entry: entry["measured"]["references"][0].update(tokens=0),
        lambda entry: entry["measured"]["references"][0].update(confidence=-0.1),
        lambda entry: entry["measured"]["background"].append(3),
        lambda entry: entry["measured"]["evaluations"][0].update(name=""),
        lambda entry: entry["measured"]["evaluations"][0].update(overlap=2.0),
        lambda entry: entry["measured"]["evaluations"][0].update(change=None),
    ],
)
def test_another_form_is_refused(edit):
    entry = json.loads(json.dumps(SAID.to_json()))
    edit(entry)
    with pytest.raises((ValueError, TypeError, KeyError)) as caught:
        CardData.of_json(entry)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LayerConfidence(-1, 0.5, 0.5),
        lambda: ConfidenceBin(0.5, float("nan"), 3),
        lambda: ConfidenceBin(0.5, 1e300, 3),
        lambda: EvaluatedText("a", -1, 1.0, MEASURED.evaluations[0].change),
        lambda: Measurements(layers=(LayerConfidence(0, 0.5, 0.5),)),
    ],
)
def test_a_measurement_of_another_form_is_refused_in_one_line(make):
    with pytest.raises(ValueError, match="are not as its documentation says") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_single_text_stands_for_a_list_of_one_and_none_for_what_there_is():
    said = SAID.stated(language="de", dataset=("a", "b"), license=None)
    assert (said.language, said.dataset, said.license) == (["de"], ["a", "b"], SAID.license)


@pytest.mark.parametrize("text", ["a\nb\x00", "\u202e", "", "x" * 999, 7])
def test_any_text_can_be_made_printable(text):
    name = printable(text)
    assert replace(SAID, dataset=[name]).dataset == [name] and name.isprintable()
