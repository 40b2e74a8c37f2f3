"""The card: what a stranger finds in it, what the Hub reads of it, and that no name in it poses as something else."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM

from knnmoe_hf import KNNMoEConfig, RoutingMemory
from knnmoe_hf.memory.card import TEMPLATE, metadata, model_card
from knnmoe_hf.memory.card.base_name import published, repository_of
from knnmoe_hf.memory.measurements import EvaluatedText
from knnmoe_hf.memory.verdict import NllChange
from tests.memory.card.examples import MEASURED, SAID, memory, verdict
from tests.memory.helpers import calibration_record, full_memory, read_config
from tests.support.models import tiny_model
from tests.support.stats import with_stats

HEADINGS = [
    "How to load it",
    "Does it help, and what does it cost?",
    "Layer by layer",
    "What is inside, and what it reveals",
    "How it was built",
    "Limits",
]


def named(card: str) -> dict[str, str]:
    """The answers of the first table by their questions."""
    return dict(re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \|$", card, re.MULTILINE))


def test_a_stranger_finds_what_it_is_for_whether_it_helps_what_it_costs_and_what_it_reveals():
    card = model_card(memory())
    answers = named(card)
    assert "`notes.jsonl`" in answers["What it is for"] and "Language: en" in answers["What it is for"]
    assert "The memory helps" in answers["Whether it helps"] and "20.09 without" in answers["Whether it helps"]
    assert "17.81 with it" in answers["Whether it helps"]  # exp(3 - 0.12)
    assert "kB of keys and values" in answers["What it costs"] and "0.0020 nats" in answers["What it costs"]
    assert "text of its references is inside" in answers["What it reveals"]
    assert answers["Licence of the reference data"] == "`cc-by-4.0`"
    assert re.findall("^## (.+)$", card, re.MULTILINE) == HEADINGS
    assert "| `new text` | 12 | 33.12 | 25.79 | -0.2500 [-0.3000 to -0.2000] |" in card
    assert "| held-out references | 16 |" in card and "background text: `python`" in card
    assert "`new text`: 3; of its runs of 8 tokens the references have 2.0 %" in card
    assert "| 0 | 8 | 7.0 kB | 0.610 | 0.110 |" in card and "| 0.720 | n/a |" in card
    assert "builder `candidates`, builder_steps 10, learning_rate 0.3" in card
    assert "None" not in card and "{" not in card.replace('model_card_kwargs={"finetuned_from"', "")


def test_what_was_not_said_or_measured_is_not_claimed():
    bare = full_memory(tiny_model("olmoe"))
    card = model_card(bare)
    answers = named(card)
    assert answers["Licence of the reference data"] == "not stated"
    assert "which its maker has not named" in answers["What it is for"]
    assert "was not measured" in answers["Whether it helps"] and "was not measured" in answers["What it costs"]
    assert "not measured with these rows" in card and "card.svg" not in card and "perplexity" not in card.lower()
    data = ModelCard(card).data.to_dict()
    assert not {"license", "datasets", "language", "base_model", "model-index"} & set(data)


def test_the_hub_reads_its_metadata():
    one = memory()
    one.config.base_model_name_or_path = "me/tiny-moe"
    card = ModelCard(model_card(one))
    data = card.data
    assert isinstance(data, ModelCardData) and data.to_yaml() == metadata(one).to_yaml()
    assert (data.base_model, data.base_model_relation, data.library_name) == ("me/tiny-moe", "adapter", "knnmoe_hf")
    assert (data.license, data.datasets, data.language) == ("cc-by-4.0", ["me/notes"], ["en"])
    assert {"knn-moe", "routing-memory", "notes"} <= set(data.tags) and data.model_name == "A memory of notes"
    (entry,) = data.to_dict()["model-index"]
    texts = {result["dataset"]["name"]: result for result in entry["results"]}
    assert len(entry["results"]) == len(texts) == 3  # each text has its own entry
    assert texts["held-out references"]["dataset"]["type"] == "me/notes"
    metrics = {one["name"].partition(",")[0]: one["value"] for one in texts["new text"]["metrics"]}
    assert metrics["Perplexity without the memory"] == pytest.approx(33.1155, abs=1e-3)
    assert metrics["Change of the NLL by the memory"] == -0.25
    assert "95 % interval -0.3000 to -0.2000, 12 windows" in str(texts["new text"]["metrics"])


@pytest.mark.parametrize("license, found", [("MIT", ("mit", None)), ("My own terms!", ("other", "my-own-terms"))])
def test_a_licence_that_the_hub_does_not_know_is_other_with_a_name(license, found):
    data = metadata(memory(license=license))
    assert (data.license, data.get("license_name")) == found
    assert license in named(model_card(memory(license=license)))["Licence of the reference data"]


# names that pose as something else

HOSTILE = [
    "a\n---\nlicense: mit",
    "a\r\n---\r\n# A heading",
    "<script>alert(1)</script>",
    "x | y | z |",
    "`code` and ``` more",
    "[text](http://example.com) ![picture](x.png)",
    "**bold** {{ 7 * 7 }} {% raw %}",
    "- a: b\n- c: !!python/object:os.system",
    "\"quoted': #comment",
    "a\u2028b\u202ec\x00d\x1b[31m",
    "x" * 5000,
]


def with_names(name: str) -> RoutingMemory:
    """A memory all of whose names are this one, as far as a file could make them so."""
    line = "".join(letter if letter.isprintable() else " " for letter in name)[:300]
    one = memory(dataset=[line], model_name=line, license=line, tags=[line])
    one = with_stats(one)
    change = NllChange(0.002, -0.001, 0.005, 16, "given")
    measured = replace(MEASURED, elsewhere_nll={name: 1.0}, evaluations=[EvaluatedText(line, 9, 3.5, change)])
    kinds = {name: dict(source="given", files=[name], examples=2, tokens=9, sha256="5e" * 32)}
    record = calibration_record(harm={}, excluded=[], background=kinds, fits={})
    found = verdict(elsewhere={name: change}, fallback=name)
    origin = replace(one.origin, base_model_class=name)
    one = replace(one, verdict=found, calibration=record, origin=origin)
    one = replace(one, card_data=replace(one.card_data, measured=measured))
    one.config.base_model_name_or_path, one.config.base_model_revision = name, name
    return one


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_can_pose_as_markup(name):
    card = model_card(with_names(name))
    data = ModelCard(card).data.to_dict()
    assert data["library_name"] == "knnmoe_hf" and data["pipeline_tag"] == "text-generation"
    assert data["license"] == "other" and "base_model" not in data
    lines = card.splitlines()
    assert lines.count("---") == 2 and lines[0] == "---"
    body = lines[lines.index("---", 1) + 1 :]
    assert [line[3:] for line in body if line.startswith("## ")] == HEADINGS
    assert sum(line.startswith("# ") for line in body) == 1
    text = "\n".join(body)
    assert "<" not in text and "49" not in re.sub(r"[\d.,]*\d49[\d]*|49[\d.]+", "", text)
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    links = re.findall(r"\]\((.*?)\)", text)
    assert set(links) <= {
        "card.svg",
        "#what-is-inside-and-what-it-reveals",
        "https://huggingface.co/datasets/me/notes",
    }
    columns = re.compile(r"(?<!\\)\|")
    tables = [line for line in body if line.startswith("|")]
    for first, second in zip(tables, tables[1:]):
        if second.startswith("|---") or second.startswith("| ---"):
            assert len(columns.findall(first)) == len(columns.findall(second)), first
    assert {len(columns.findall(line)) for line in body if line.startswith("| **")} == {3}


# the base model's name


def folder_of(tmp_path, **config):
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "secret" / "base")
    path = tmp_path / "secret" / "base" / "config.json"
    if config:
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return AutoModelForCausalLM.from_pretrained(tmp_path / "secret" / "base")


def built_for(model) -> RoutingMemory:
    keys, values = {0: torch.randn(6, 32), 1: torch.randn(6, 32)}, {0: torch.randn(6, 8), 1: torch.randn(6, 8)}
    return RoutingMemory.from_rows(KNNMoEConfig(), keys, values, model)


def texts_in(folder) -> str:
    files = [path for path in folder.rglob("*") if path.suffix in (".md", ".svg", ".json", ".jinja", ".txt")]
    return "\n".join(path.read_text() for path in files)


def test_a_folder_is_not_named_and_the_card_asks_for_the_name(tmp_path):
    one = replace(built_for(folder_of(tmp_path)), verdict=verdict(), card_data=SAID)
    assert one.config.base_model_name_or_path == str(tmp_path / "secret" / "base")  # by which it is loaded here
    card = model_card(one)
    assert "secret" not in card and str(tmp_path) not in card and ModelCard(card).data.base_model is None
    assert "The base model is not named here" in card and '{"finetuned_from": "owner/base-model"}' in card
    published(one).save_pretrained(tmp_path / "pushed")
    assert "secret" not in texts_in(tmp_path / "pushed") and str(tmp_path) not in texts_in(tmp_path / "pushed")
    assert RoutingMemory.from_pretrained(tmp_path / "pushed").config.base_model_name_or_path is None


def test_a_folder_that_names_its_repository_is_called_by_it(tmp_path):
    one = built_for(folder_of(tmp_path, _name_or_path="me/tiny-moe"))
    card = model_card(one)
    assert repository_of(one) == "me/tiny-moe" == ModelCard(card).data.base_model and "secret" not in card
    assert published(one).config.base_model_name_or_path == "me/tiny-moe"
    assert one.config.base_model_name_or_path == str(tmp_path / "secret" / "base")


@pytest.mark.parametrize("name", ["/home/me/base", "../base", "a/b/c", "", 3, None, ["me/x"], "C:\\base"])
def test_a_folder_that_names_no_repository_is_not_named(tmp_path, name):
    assert repository_of(built_for(folder_of(tmp_path, _name_or_path=name))) is None


def test_a_folder_whose_name_looks_like_a_repositorys_is_not_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path)
    one = built_for(AutoModelForCausalLM.from_pretrained("secret/base"))
    assert repository_of(one) is None and "secret" not in model_card(one)


def test_the_maker_can_name_the_base_model_and_it_is_loaded_from_there():
    one = memory(finetuned_from="me/tiny-moe")
    one.config.base_model_name_or_path = "/home/me/base"
    assert ModelCard(model_card(one)).data.base_model == "me/tiny-moe"
    assert "AutoModelForCausalLM.from_pretrained" in model_card(one)
    assert published(one).config.base_model_name_or_path == "me/tiny-moe"


# what its maker states, and what edits leave of it


def test_statements_are_saved_and_opened(tmp_path):
    one = memory()
    one.save_pretrained(tmp_path, model_card_kwargs=dict(license="mit", dataset="my notes"))
    opened = RoutingMemory.from_pretrained(tmp_path)
    assert opened.card_data == replace(SAID, license="mit", dataset=["my notes"])
    assert "`my notes`" in (tmp_path / "README.md").read_text() and one.card_data == SAID


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(license="a\nb"), "license='a\\nb' is not allowed"),
        (dict(language="english please"), "use a code such as 'en'"),
        (dict(dataset_tags="a/b/c"), "the name of a repository of the Hub"),
        (dict(finetuned_from="/home/me"), "the name of a repository of the Hub"),
        (dict(tags=[3]), "tags=[3] is not allowed"),
        (dict(model_name=" "), "model_name=' ' is not allowed"),
        (dict(licence="mit"), "'licence' is nothing that a card states"),
    ],
)
def test_a_statement_that_is_not_allowed_is_refused_in_one_sentence(tmp_path, given, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        memory().save_pretrained(tmp_path / "out", model_card_kwargs=given)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "edit",
    [
        lambda one: one.remove_examples([0]),
        lambda one: one.select_rows(max_rows=20),
        lambda one: one.recoded(tiny_model("olmoe"), key_codec="pca", key_dim=8),
        lambda one: replace(one, config=KNNMoEConfig(**one.config.options() | {"gamma": 7.0}), verdict=None),
    ],
    ids=["remove_examples", "select_rows", "recoded", "options"],
)
def test_nothing_that_was_measured_is_claimed_of_another_memory(edit):
    edited = edit(memory())
    done = edited.card_data.history
    assert edited.card_data == replace(SAID, measured=None, history=done)
    card = model_card(edited)
    assert "model-index" not in card and "card.svg" not in card and "new text" not in card and "0.610" not in card
    assert "`cc-by-4.0`" in card and all(line in card.replace("&gt;", ">") for line in done)


def test_changed_options_are_not_what_was_measured(tmp_path):
    one = replace(memory(), verdict=verdict(settings={"gamma": 0.3}))
    one.save_pretrained(tmp_path / "one")
    opened = RoutingMemory.from_pretrained(tmp_path / "one", gamma=7.0)
    assert opened.card_data.measured is None and RoutingMemory.from_pretrained(tmp_path / "one").card_data == SAID
    changed = copy.deepcopy(opened)
    changed.save_pretrained(tmp_path / "two")
    assert "new text" not in (tmp_path / "two" / "README.md").read_text()


def test_a_merged_memory_says_what_both_say():
    other = full_memory(tiny_model("olmoe"), examples=(20, 21), seed=4)
    said = replace(SAID, license="mit", dataset=["letters.txt"], dataset_tags=[], language=["de", "en"])
    merged = memory().merge(replace(other, card_data=said))
    assert merged.card_data.license is None and merged.card_data.model_name == SAID.model_name
    assert merged.card_data.dataset == ["notes.jsonl", "letters.txt"] and merged.card_data.language == ["en", "de"]
    assert merged.card_data.build == SAID.build and merged.card_data.measured is None
    assert "`notes.jsonl` and `letters.txt`" in model_card(merged) and "not stated" in model_card(merged)


def test_the_template_is_the_one_in_model_cards():
    link = Path(__file__).parents[3] / "model_cards" / "template.md"
    assert link.is_symlink() and link.resolve() == TEMPLATE.resolve()


def test_config_keeps_what_the_card_says(tmp_path):
    memory().save_pretrained(tmp_path)
    entry = read_config(tmp_path)["memory"]["card_data"]
    assert entry["license"] == "cc-by-4.0" and entry["measured"]["layers"][0]["references"] == 0.61


def test_the_card_of_the_labs_memory_was_written_by_this_code():
    folder = Path(__file__).parents[3] / "model_cards" / "lab-olmoe-memory"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "knnmoe_hf" and card.data.eval_results and card.data.license_name == "psf-2.0"
    assert re.findall("^## (.+)$", card.text, re.MULTILINE) == HEADINGS and "](card.svg)" in card.text
    assert list(named(card.text)) == list(named(model_card(memory())))
    assert (folder / "card.svg").read_text().startswith("<svg")
