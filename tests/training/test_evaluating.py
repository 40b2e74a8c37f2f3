"""`evaluate` and `predict` of a trainer on text that its memory holds, in data sets of each kind."""

import logging

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset

from knnmoe_hf import KNNMoETrainer, KNNMoETrainingArguments, RoutingMemory, attach_memory, disable_memory
from tests.support.models import tiny_model
from tests.support.training import build, examples, trainer_for

REFERENCES = examples(6, length=60)
NEW = examples(4, length=60, seed=8)


class Stream(IterableDataset):
    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def streamed(rows: list[dict]) -> datasets.IterableDataset:
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


KINDS = {"list": list, "Dataset": datasets.Dataset.from_list, "Stream": Stream, "IterableDataset": streamed}


def again(rows: list[dict], length: int = 45) -> list[dict]:
    """The same text in other chunks."""
    ids = [token for row in rows for token in row["input_ids"]]
    return [{"input_ids": ids[start : start + length]} for start in range(0, len(ids) - length + 1, length)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> KNNMoETrainer:
    trainer = trainer_for(tiny_model("olmoe"), tmp_path_factory.mktemp("trained"), REFERENCES)
    trainer.train()
    return trainer


@pytest.fixture
def allowing(trained):
    trained.args.allow_overlap = True
    yield trained
    trained.args.allow_overlap = False


@pytest.mark.parametrize("kind", KINDS)
def test_examples_that_the_memory_holds_are_left_out(trained, kind):
    mixed = [REFERENCES[0], NEW[0], *NEW[1:], *again(REFERENCES)]
    metrics, alone = trained.evaluate(KINDS[kind](mixed)), trained.evaluate(NEW)
    assert metrics["eval_windows"] == alone["eval_windows"] == 4
    assert metrics["eval_windows_left_out"] == 9 and alone["eval_windows_left_out"] == 0
    assert 0.5 < metrics["eval_overlap_share"] < 0.75 and alone["eval_overlap_share"] == 0
    for name in ("eval_loss", "eval_base_loss"):
        assert metrics[name] == pytest.approx(alone[name], abs=1e-5)
    assert trained.state.log_history[-1]["eval_windows"] == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [REFERENCES, again(REFERENCES)])
def test_evaluating_on_the_references_is_refused(trained, kind, rows):
    with pytest.raises(ValueError, match=rf"holds all {len(rows)} windows of eval_dataset: give held-out text"):
        trained.evaluate(KINDS[kind](rows))


@pytest.mark.parametrize("kind", KINDS)
def test_with_allow_overlap_they_stay_and_a_warning_says_so_once(allowing, kind, caplog):
    metrics = allowing.evaluate(KINDS[kind](REFERENCES + NEW))
    assert metrics["eval_windows"] == 10 and metrics["eval_windows_left_out"] == 0
    assert metrics["eval_overlap_share"] == pytest.approx(0.6)
    assert caplog.text.count("6 of the 10 windows of test text overlap the references and are scored") == 1


def test_each_of_several_eval_datasets_is_checked(trained, caplog):
    metrics = trained.evaluate({"mixed": REFERENCES[:2] + NEW[:3], "new": Stream(NEW)})
    assert metrics["eval_mixed_windows"] == 3 and metrics["eval_mixed_windows_left_out"] == 2
    assert metrics["eval_new_windows"] == 4 and metrics["eval_new_overlap_share"] == 0
    assert caplog.text.count("2 of the 5 windows") == 1


def test_the_refusal_names_the_one_of_several_that_is_held(tmp_path, trained):
    named = {"good": NEW, "bad": again(REFERENCES)}
    args = KNNMoETrainingArguments(output_dir=str(tmp_path), report_to="none", disable_tqdm=True)
    trainer = KNNMoETrainer(trained.model, args, eval_dataset=named)
    with pytest.raises(ValueError, match=r"windows of eval_dataset\['bad'\]"):
        trainer.evaluate()


def test_workers_that_load_a_stream_count_too(trained):
    trained.args.dataloader_num_workers = 1
    try:
        metrics = trained.evaluate(Stream(REFERENCES[:2] + NEW))
    finally:
        trained.args.dataloader_num_workers = 0
    assert metrics["eval_windows"] == 4 and metrics["eval_windows_left_out"] == 2


def test_predict_keeps_every_row_and_warns(trained, caplog):
    output = trained.predict(REFERENCES[:2] + NEW)
    assert len(output.predictions) == 6
    assert output.metrics["test_windows"] == 6 and output.metrics["test_overlap_share"] == pytest.approx(1 / 3)
    assert "test_dataset: 2 of the 6 windows" in caplog.text


def test_the_model_without_its_memory_may_be_evaluated_on_anything(trained):
    with disable_memory(trained.model):
        metrics = trained.evaluate(REFERENCES)
    assert metrics["eval_loss"] == metrics["eval_base_loss"] and "eval_windows" not in metrics


@pytest.mark.parametrize("level, checked", [("ids", True), ("none", False)])
def test_a_memory_that_was_saved_without_text(tmp_path, level, checked, caplog):
    model = tiny_model("olmoe")
    build(model, tmp_path, REFERENCES).save_pretrained(tmp_path / "memory", provenance=level)
    attach_memory(model, RoutingMemory.from_pretrained(tmp_path / "memory"))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        trainer = trainer_for(model, tmp_path)
        if checked:
            with pytest.raises(ValueError, match="holds all 8 windows"):
                trainer.evaluate(again(REFERENCES))
            assert trainer.evaluate(NEW)["eval_overlap_share"] == 0
        else:
            metrics = trainer.evaluate(again(REFERENCES))
            assert metrics["eval_windows"] == 8 and "eval_overlap_share" not in metrics
            assert caplog.text.count("could not be checked") == 1


def test_another_memory_in_force_is_looked_up_anew(trained, tmp_path):
    model = tiny_model("olmoe")
    trainer = trainer_for(model, tmp_path, NEW, dataloader_persistent_workers=True, dataloader_num_workers=1)
    attach_memory(model, trained.memory, "first")
    first = trainer.evaluate(NEW)
    assert first["eval_windows"] == 4
    trainer.train()
    with pytest.raises(ValueError, match="holds all 4 windows"):
        trainer.evaluate(NEW)
    last = trainer.evaluate(REFERENCES)
    assert last["eval_windows"] == 6 and abs(last["eval_base_loss"] - first["eval_base_loss"]) > 1e-3
    assert torch.equal(trainer.memory.provenance.examples, torch.arange(4))
