"""What a build says for its memory's card: options, data, and how the memory does on text that it does not hold."""

import logging
from dataclasses import replace

import datasets
import pytest
from huggingface_hub import ModelCard

from knnmoe_hf import RoutingMemory, get_memory
from knnmoe_hf.evaluation.overlap import without_overlap
from knnmoe_hf.evaluation.scores import paired_bootstrap, score
from knnmoe_hf.models.attach import disable_memory
from knnmoe_hf.training.describing import repositories_of
from tests.support.domain import domain, own_text
from tests.support.models import tiny_model
from tests.support.training import examples, trainer_for

REFERENCES = [{name: row[name] for name in ("input_ids", "labels")} for row in domain(24, 5)]
NEW = [{name: row[name] for name in ("input_ids", "labels")} for row in domain(9, 6)]
CONFIG = dict(num_neighbors=4, gamma=0.1, confidence="rbf")
OPTIONS = dict(per_device_train_batch_size=8, builder_steps=2)


def built(folder, eval_dataset=None, **arguments):
    model = tiny_model("olmoe")
    background = {"own": own_text(model, 40, 1)}
    more = dict(eval_dataset=eval_dataset, ordinary_dataset=background)
    trainer = trainer_for(model, folder, REFERENCES, CONFIG, more, **(OPTIONS | arguments))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    stated = dict(license="cc-by-4.0", language="en", dataset_name="notes", model_name="Notes", max_rows=500)
    return built(tmp_path_factory.mktemp("built"), {"new": NEW, "old": REFERENCES[:4]}, **stated)


def test_a_build_says_how_it_was_made_and_what_its_maker_states(trainer):
    said = trainer.memory.card_data
    assert (said.model_name, said.license, said.language, said.dataset) == ("Notes", "cc-by-4.0", ["en"], ["notes"])
    assert said.build == {
        "builder": "candidates",
        "builder_steps": 2,
        "learning_rate": 0.3,
        "max_length": 1024,
        "max_rows": 500,
    }
    assert said.dataset_tags == [] and get_memory(trainer.model).card_data == said


def test_confidence_and_gain_are_measured_with_the_verdict(trainer):
    measured, verdict = trainer.memory.card_data.measured, trainer.memory.verdict
    assert [one.layer for one in measured.layers] == list(trainer.memory.layers)
    assert all(0 < one.references <= 1 and 0 < one.background <= 1 for one in measured.layers)
    tokens = sum(one.tokens for one in measured.references)
    mean = sum(one.tokens * one.change for one in measured.references) / tokens
    assert mean == pytest.approx(verdict.gain.mean, abs=1e-5)  # the groups of tokens hold them all
    confidences = [one.confidence for one in measured.references]
    assert confidences == sorted(confidences)
    costs = sum(one.tokens * one.change for one in measured.background) / sum(
        one.tokens for one in measured.background
    )
    assert costs == pytest.approx(verdict.elsewhere["own"].mean, abs=1e-5)
    assert measured.elsewhere_nll.keys() == verdict.elsewhere.keys() and measured.base_nll > 0


def test_eval_dataset_is_evaluated_at_the_end_without_what_the_memory_holds(trainer):
    (found,) = trainer.memory.card_data.measured.evaluations  # nothing is left of "old"
    assert (found.name, found.left_out, found.change.windows) == ("new", 2, 7) and 0 < found.overlap < 1
    rows, _ = without_overlap(trainer.memory, trainer.eval_dataset["new"])
    used = score(trainer.model, rows)
    with disable_memory(trainer.model):
        base = score(trainer.model, rows)
    change = paired_bootstrap(base, used)
    assert found.base_nll == pytest.approx(base.mean_nll) and found.tokens == int(base.tokens.sum())
    assert found.change.mean == pytest.approx(change.mean) and found.change.low == pytest.approx(change.low, abs=1e-4)
    metrics = trainer.evaluate(NEW)
    assert metrics["eval_loss"] - metrics["eval_base_loss"] == pytest.approx(found.change.mean, abs=1e-4)


def test_a_text_of_which_nothing_is_left_is_warned_of(tmp_path, caplog):
    trainer = built(tmp_path, REFERENCES[:4])
    assert trainer.memory.card_data.measured.evaluations == []
    assert (
        "the card tells nothing of evaluation text: none of its text that the memory does not hold is left"
        in caplog.text
    )


def test_a_stream_is_evaluated_too(tmp_path):
    trainer = built(tmp_path, datasets.Dataset.from_list(NEW).to_iterable_dataset())
    (found,) = trainer.memory.card_data.measured.evaluations
    assert (found.name, found.change.windows) == ("evaluation text", 7)


def test_all_of_it_is_in_the_card_that_is_saved(trainer, tmp_path):
    trainer.save_model(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "cc-by-4.0" and card.data.model_name == "Notes"
    assert "| `new` | 7 |" in card.text and "](card.svg)" in card.text and (tmp_path / "card.svg").is_file()
    assert str(tmp_path) not in card.text
    assert RoutingMemory.from_pretrained(tmp_path).card_data == trainer.memory.card_data


def test_more_can_be_stated_after_the_build(tmp_path):
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, examples(3))
    with pytest.raises(ValueError, match="there is no memory yet"):
        trainer.create_model_card(license="mit")
    trainer.train()
    trainer.create_model_card(license="mit", dataset="notes")
    assert not (tmp_path / "out" / "config.json").exists()  # nothing was saved there before
    trainer.save_model()
    trainer.create_model_card(
        tags="x", finetuned_from="me/base", dataset_args=["train", "v2"], tasks="text-generation"
    )
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "me/base") and "x" in card.data.tags
    assert "`notes (train, v2)`" in card.text and get_memory(trainer.model).card_data == trainer.memory.card_data
    with pytest.raises(ValueError, match="tasks='ocr' is not allowed"):
        trainer.create_model_card(tasks="ocr")


@pytest.mark.parametrize("given", [dict(license="a\nb"), dict(language=["x y"]), dict(dataset_tags="a/b/c")], ids=str)
def test_a_statement_that_is_not_allowed_is_refused_before_the_build(tmp_path, given):
    with pytest.raises(ValueError, match=f"{min(given)}=.* is not allowed") as caught:
        trainer_for(tiny_model("olmoe"), tmp_path, **given)
    assert "\n" not in str(caught.value)


def test_data_of_the_hub_is_named_by_its_repository_and_local_data_is_not():
    dataset = datasets.Dataset.from_list(examples(2))
    assert repositories_of(dataset) == [] == repositories_of(examples(2)) == repositories_of(None)
    sums = {f"hf://datasets/me/notes@{'0' * 40}/{part}.json": {} for part in "ab"}
    dataset.info.download_checksums = sums | {"/home/me/secret/private.json": {}, "hf://datasets/x@1/y": {}}
    assert repositories_of(dataset) == ["me/notes"]


def test_another_builder_has_no_learning_rate(tmp_path):
    trainer = trainer_for(tiny_model("olmoe"), tmp_path, examples(3), builder="search")
    trainer.train()
    assert "learning_rate" not in trainer.memory.card_data.build
    assert replace(trainer.memory.card_data).build["builder"] == "search"


def test_nothing_is_evaluated_without_an_eval_dataset(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert built(tmp_path).memory.card_data.measured.evaluations == []
    assert "the card tells nothing" not in caplog.text
