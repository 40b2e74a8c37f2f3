"""A build ends with a verdict: measured on text that nothing was fitted to, logged and printed in Trainer's loop."""

import copy
import logging
import time
from dataclasses import replace

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import ProgressCallback, TrainerCallback

from knnmoe_hf import RoutingMemory, calibrate, detach_memory
from knnmoe_hf.calibration.background import BackgroundText
from knnmoe_hf.calibration.held_out import hold_out, hold_out_for_verdict
from knnmoe_hf.evaluation.scores import paired_bootstrap, score
from knnmoe_hf.training.finish import PrintVerdict
from tests.support.attaching import attached
from tests.support.domain import domain, own_text
from tests.support.models import tiny_model
from tests.support.training import trainer_for

CONFIG = dict(num_neighbors=4, gamma=0.1, half_life=4.0)


class Seen(TrainerCallback):
    """What a logger, such as TensorBoard's, sees until training ends."""

    def __init__(self):
        self.logs, self.ended = [], False

    def on_train_begin(self, args, state, control, **kwargs):
        self.ended = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        assert not self.ended, "TensorBoard's file is closed now"
        self.logs.append(dict(logs))

    def on_train_end(self, args, state, control, **kwargs):
        self.ended = True


def built(model, folder, references, background=None, confidence="calibrated", trainer=None, **arguments):
    references = [{"input_ids": one["input_ids"], "labels": one["labels"]} for one in references]
    more = dict(ordinary_dataset=background, callbacks=[Seen()]) | (trainer or {})
    options = dict(per_device_train_batch_size=8, builder_steps=4) | arguments
    made = trainer_for(model, folder, references, CONFIG | dict(confidence=confidence), more, **options)
    made.output = made.train()
    detach_memory(model)
    return made


@pytest.fixture(scope="module")
def olmoe():
    return tiny_model("olmoe")


@pytest.fixture(scope="module")
def helpful(olmoe, tmp_path_factory):
    background = {"one": own_text(olmoe, 40, 1), "of the domain": domain(40, 77)}
    return built(olmoe, tmp_path_factory.mktemp("helpful"), domain(72, 0), background)


def seen(trainer) -> Seen:
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, Seen))


# what is measured


def test_the_gain_is_that_on_references_that_neither_lookups_nor_calibration_have(helpful, olmoe):
    memory, verdict = helpful.memory, helpful.memory.verdict
    held, fitted = hold_out_for_verdict(memory.provenance), hold_out(memory)
    of_verdict, of_fit = ({row["example_id"] for row in part.rows} for part in (held, fitted))
    left = set(memory.provenance.example_ids[held.rest].tolist())
    assert not of_verdict & of_fit and not left & (of_verdict | of_fit) and max(left) < min(of_verdict) - 2
    rest = replace(memory.take(held.rest), verdict=None)
    base = score(olmoe, held.rows)
    with attached(olmoe, rest):
        used = score(olmoe, held.rows)
    rest.config.confidence = "rbf"
    with attached(olmoe, rest):
        wide_open = score(olmoe, held.rows)
    assert verdict.repeated == 9 - len(held.rows)
    change = paired_bootstrap(base, used)
    assert (verdict.gain.mean, verdict.gain.low) == pytest.approx((change.mean, change.low), abs=1e-5)
    assert verdict.open_gain.mean == pytest.approx(paired_bootstrap(base, wide_open).mean, abs=1e-5)
    assert verdict.outcome == "helps" and verdict.gain.windows == len(held.rows) >= 5 and verdict.examples == 72


def test_the_cost_is_that_on_background_text_that_the_calibration_has_not_read(helpful, olmoe):
    for kind, text in helpful.ordinary_dataset.items():
        read = {tuple(row["input_ids"]) for row in text.rows}
        assert len(text.rows) == 30 and len(text.unread) == 10
        assert not read & {tuple(row["input_ids"]) for row in text.unread}
        base = score(olmoe, text.unread)
        with attached(olmoe, helpful.memory):
            used = score(olmoe, text.unread)
        found, wanted = helpful.memory.verdict.elsewhere[kind], paired_bootstrap(base, used)
        assert (found.mean, found.low, found.high) == pytest.approx((wanted.mean, wanted.low, wanted.high), abs=1e-5)
        assert found.windows == 10 and found.source == "given"
    assert helpful.memory.verdict.elsewhere["of the domain"].gains


def test_a_memory_of_another_domain_harms_and_is_said_to(olmoe, tmp_path):
    """References whose held-out part is text that the model itself writes."""
    references = [*domain(60, 0), *own_text(olmoe, 36, 5)]
    verdict = built(olmoe, tmp_path, references, confidence="rbf").memory.verdict
    assert verdict.outcome == "harms" and verdict.metrics()["verdict_helps"] == -1
    assert "do not leave it on" in verdict.sentences()[1]


def test_references_that_are_there_twice_tell_nothing_more(olmoe, tmp_path):
    same = [one for one in domain(1, 0) for _ in range(40)]
    verdict = built(olmoe, tmp_path, same).memory.verdict
    assert verdict.gain is None and verdict.repeated == 5 and verdict.outcome == "too few references"
    assert "have the text of all 5" in verdict.sentences()[0]


def test_targets_that_selection_dropped_are_measured_all_the_same(olmoe, tmp_path, helpful):
    verdict = built(olmoe, tmp_path, domain(72, 0), max_rows=200).memory.verdict
    assert (
        verdict.examples == 72
        and verdict.tokens == 72 * 23
        and verdict.gain.windows == helpful.memory.verdict.gain.windows
    )


def test_a_memory_whose_rows_were_all_dropped_changes_nothing_and_says_why(olmoe, tmp_path):
    verdict = built(olmoe, tmp_path, domain(72, 0), {"one": own_text(olmoe, 40, 1)}, min_gain=1e6).memory.verdict
    changes = [verdict.gain, verdict.open_gain, verdict.elsewhere["one"]]
    assert all((one.mean, one.low, one.high) == (0, 0, 0) for one in changes) and not verdict.may_be_left_on
    text = " ".join(verdict.sentences())
    assert "no rows" in text and "min_gain" in text and "none can be held out" not in text and "'ids'" not in text


@pytest.mark.parametrize("confidence", ["rbf", "context"])
def test_other_confidences_are_judged_too(olmoe, tmp_path, confidence):
    verdict = built(olmoe, tmp_path, domain(48, 0), {"one": own_text(olmoe, 40, 1)}, confidence).memory.verdict
    assert verdict.confidence == confidence and verdict.fallback is None
    assert verdict.gain is not None and set(verdict.elsewhere) == {"one"}
    assert (verdict.kept == 1) == (confidence == "rbf")


def test_a_calibration_measures_it_anew_and_one_that_falls_back_leaves_it(helpful, olmoe):
    other = own_text(olmoe, 40, 3)
    fitted, record = calibrate(olmoe, helpful.memory, {"other": other}, batch_size=8)
    assert record is not None and set(fitted.verdict.elsewhere) == {"other"}
    assert fitted.verdict.open_gain == helpful.memory.verdict.open_gain
    same, record = calibrate(olmoe, helpful.memory, {})
    assert record is None and same.verdict == helpful.memory.verdict
    bare, _ = calibrate(olmoe, helpful.memory, {"other": BackgroundText(other)}, batch_size=8)
    assert not bare.verdict.elsewhere and "was not measured" in bare.verdict.sentences()[1]


# where it is said


def test_it_is_logged_before_training_ends_and_among_the_metrics(helpful):
    wanted = helpful.memory.verdict.metrics()
    assert wanted.items() <= helpful.output.metrics.items()
    (logged,) = [logs for logs in seen(helpful).logs if "verdict_gain" in logs]
    assert wanted.items() <= logged.items()
    assert [logs for logs in helpful.state.log_history if "verdict_gain" in logs]


def test_too_few_references_say_so_once_and_how_many_would_do(olmoe, tmp_path, caplog, capsys):
    with caplog.at_level(logging.WARNING, "knnmoe_hf"):
        trainer = built(olmoe, tmp_path, domain(5, 0))
    verdict = trainer.memory.verdict
    assert verdict.outcome == "too few references" and not caplog.text
    needed = f"{verdict.references_needed:,} references"
    printed = capsys.readouterr().out
    assert needed in printed and [printed.count(sentence) for sentence in verdict.sentences()] == [1, 1, 1]
    assert seen(trainer).logs[-2]["verdict_references_needed"] == verdict.references_needed
    trainer.save_model(str(tmp_path / "saved"))
    assert needed in (tmp_path / "saved" / "README.md").read_text()
    assert RoutingMemory.from_pretrained(tmp_path / "saved").verdict == verdict


def test_the_printer_can_be_removed(olmoe, tmp_path, capsys):
    references = [{"input_ids": one["input_ids"], "labels": one["labels"]} for one in domain(8, 0)]
    trainer = trainer_for(olmoe, tmp_path, references, CONFIG, {})
    trainer.remove_callback(PrintVerdict)
    trainer.train()
    detach_memory(olmoe)
    assert trainer.memory.verdict.sentences()[0] not in capsys.readouterr().out


# time and progress


def test_the_runtime_covers_what_follows_the_last_batch(olmoe, tmp_path, monkeypatch):
    from knnmoe_hf.training import trainer as module

    refine = module.refine

    def slowly(*args):
        time.sleep(1.5)
        return refine(*args)

    monkeypatch.setattr(module, "refine", slowly)
    metrics = built(olmoe, tmp_path, domain(8, 0)).output.metrics
    assert metrics["train_runtime"] >= 1.5


class RecordingBar:
    """In place of tqdm's bar."""

    def __init__(self, total, **kwargs):
        self.total, self.n, self.steps = total, 0, []

    def update(self, more):
        self.n += more
        self.steps.append((self.n, self.total))

    def refresh(self):
        self.steps.append((self.n, self.total))

    def write(self, text):
        pass

    def close(self):
        self.closed = True


def test_the_bar_goes_on_after_the_last_batch_and_ends_full(olmoe, tmp_path, monkeypatch):
    bars = []
    monkeypatch.setattr(
        "transformers.trainer_callback.tqdm", lambda **kwargs: bars.append(RecordingBar(**kwargs)) or bars[-1]
    )
    background = {"one": own_text(olmoe, 64, 1), "two": own_text(olmoe, 64, 2)}
    built(olmoe, tmp_path, domain(24, 0), background, disable_tqdm=False)
    (bar,) = bars
    assert bar.closed and bar.n == bar.total > 3 and all(n <= total for n, total in bar.steps)
    after = [n for n, _ in bar.steps if n > 3]
    assert len(set(after)) > 1 and [n for n, _ in bar.steps] == sorted(n for n, _ in bar.steps)
    totals = {total for n, total in bar.steps if n >= 2}
    assert max(totals) - min(totals) <= 1  # the first batch tells how long the rest takes


class Own(ProgressCallback):
    def on_train_end(self, args, state, control, **kwargs):
        self.total = self.training_bar.total
        self.full = self.training_bar.n == self.total
        super().on_train_end(args, state, control, **kwargs)


def test_bars_of_the_user_whenever_they_were_added(olmoe, tmp_path):
    own = Own()
    built(olmoe, tmp_path, domain(16, 0), trainer=dict(callbacks=[Seen(), own]), disable_tqdm=True)
    assert own.full
    later = Own()
    trainer = trainer_for(olmoe, tmp_path, domain(16, 0), CONFIG, {}, disable_tqdm=True)
    trainer.add_callback(later)
    trainer.train()
    detach_memory(olmoe)
    assert later.full and later.total > trainer.state.max_steps


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter([{"input_ids": one["input_ids"], "labels": one["labels"]} for one in self.rows])


def test_a_stream_that_ends_before_max_steps_is_read_once_and_judged(olmoe, tmp_path):
    trainer = trainer_for(olmoe, tmp_path, Stream(domain(16, 0)), CONFIG, {}, max_steps=50)
    trainer.train()
    detach_memory(olmoe)
    assert trainer.state.global_step == 8 and trainer.memory.verdict.examples == 16


class StopAfterTwo(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_a_build_that_a_callback_stops_is_judged_by_what_it_has(olmoe, tmp_path):
    trainer = built(olmoe, tmp_path, domain(40, 0), trainer=dict(callbacks=[Seen(), StopAfterTwo()]))
    assert trainer.memory.verdict.examples == 16 and seen(trainer).logs[-2]["verdict_windows"] == 2


@pytest.mark.parametrize("strategy", ["no", "epoch", "steps"])
def test_no_log_of_trainer_is_lost(olmoe, tmp_path, strategy):
    logs = seen(built(olmoe, tmp_path, domain(16, 0), logging_strategy=strategy, logging_steps=1)).logs
    counts = [sum(name in one for one in logs) for name in ("loss", "verdict_helps", "train_runtime")]
    assert counts == [{"no": 0, "epoch": 1, "steps": 2}[strategy], 1, 1]


def test_a_second_build_starts_anew(olmoe, tmp_path):
    trainer = built(olmoe, tmp_path, domain(16, 0))
    first = copy.deepcopy(trainer.memory.verdict)
    trainer.train()
    detach_memory(olmoe)
    assert trainer.memory.verdict == first and torch.is_grad_enabled()
