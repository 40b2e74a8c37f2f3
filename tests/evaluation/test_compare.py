"""Comparing base model and memory on the same rows; metrics of the `evaluate` library on a model with a memory."""

import evaluate
import pytest
import torch

from knnmoe_hf import attach_memory, disable_memory, set_memory
from knnmoe_hf.data.batches import IGNORED
from knnmoe_hf.data.examples import prepare_dataset
from knnmoe_hf.evaluation import compare, score
from knnmoe_hf.models.attach import watch_lookups
from tests.evaluation.test_scores import examples
from tests.memory.helpers import full_memory
from tests.support.models import random_memory, tiny_model
from tests.support.stats import with_fit


@pytest.fixture
def model_with_memory(model):
    attach_memory(model, random_memory(model))
    return model


def test_base_is_the_disabled_memory_and_memory_the_enabled_one(model_with_memory):
    rows = examples()
    comparison = compare(model_with_memory, rows, batch_size=2)
    with disable_memory(model_with_memory):
        base = score(model_with_memory, rows, 2)
    memory = score(model_with_memory, rows, 2)
    for name in ("nll", "hits", "tokens"):
        assert torch.equal(getattr(comparison.base, name), getattr(base, name))
        assert torch.equal(getattr(comparison.memory, name), getattr(memory, name))
    assert (base.nll - memory.nll).abs().max() > 1e-3
    assert comparison.change().mean == pytest.approx(memory.mean_nll - base.mean_nll)
    assert comparison.change("hits").mean == pytest.approx(memory.accuracy - base.accuracy)


def test_confidence_is_the_mean_over_real_tokens(model_with_memory):
    rows = examples()
    sums, tokens = {0: 0.0, 1: 0.0}, sum(sum(row["attention_mask"]) for row in rows)
    for row in rows:  # one by one, with each row's own padding

        def note(event, row=row):
            confidence = event.confidence[torch.tensor(row["attention_mask"], dtype=torch.bool)]
            assert 0 < confidence.min() and confidence.max() <= 1
            sums[event.layer] += confidence.sum().item()

        with watch_lookups(model_with_memory, note), torch.no_grad():
            ids, mask = (torch.tensor([row[name]]) for name in ("input_ids", "attention_mask"))
            model_with_memory(input_ids=ids, attention_mask=mask)
    for batch_size in (1, 2, 5):
        confidence = compare(model_with_memory, rows, batch_size).confidence
        assert confidence == pytest.approx({layer: total / tokens for layer, total in sums.items()}, rel=1e-4)


def test_the_confidence_in_next_tokens_is_told_where_routing_stays_shut(model):
    fitted = dict(recall="both", confidence="calibrated", context_threshold=0.3)
    attach_memory(model, with_fit(random_memory(model, **fitted), routing_threshold=100.0))
    comparison = compare(model, examples())
    assert comparison.confidence == {0: 0.0, 1: 0.0} and 0.01 < comparison.recall_confidence < 1
    attach_memory(model, random_memory(model), "routing")
    assert compare(model, examples()).recall_confidence is None


def test_comparing_restores_training_mode_and_memory(model_with_memory):
    model_with_memory.train()
    compare(model_with_memory, examples())
    assert all(module.training for module in model_with_memory.modules())
    events = []
    with watch_lookups(model_with_memory, events.append), torch.no_grad():
        model_with_memory(input_ids=torch.tensor([[1, 2, 3]]))
    assert len(events) == 2  # the memory is in force, and no other observer is left


def test_a_model_without_memory_and_rows_without_targets_are_refused():
    model = tiny_model("olmoe")
    with pytest.raises(ValueError, match="no memory is attached"):
        compare(model, examples())
    attach_memory(model, random_memory(model))
    untargeted = prepare_dataset([{"input_ids": [1, 2], "labels": [1, IGNORED]}, {"input_ids": [3]}], None, None)
    for rows in ([], untargeted):
        with pytest.raises(ValueError, match="no row has a target token"):
            compare(model, rows)


def held_and_new(model, count: int = 6) -> tuple[list[dict], list[dict]]:
    """Attaches a memory; rows that are its references, and as many that are not."""
    memory = full_memory(model, examples=tuple(range(count)))
    attach_memory(model, memory)
    held = [{"input_ids": ids.tolist()} for ids in memory.provenance.tokens().values()]
    new = [{"input_ids": ids} for ids in torch.randint(96, (count, 11), generator=torch.manual_seed(7)).tolist()]
    return list(prepare_dataset(held, None, None)), list(prepare_dataset(new, None, None))


def test_rows_that_the_memory_holds_are_left_out(model, caplog):
    held, new = held_and_new(model)
    mixed, alone = compare(model, held + new), compare(model, new)
    assert torch.equal(mixed.memory.nll, alone.memory.nll) and torch.equal(mixed.base.nll, alone.base.nll)
    assert (mixed.overlap.windows, mixed.overlap.left_out, mixed.overlap.share) == (12, 6, 0.5)
    assert alone.overlap.left_out == 0 and mixed.change() == alone.change() and mixed.change().windows == 6
    with pytest.raises(ValueError, match="holds all 6 windows of the test text"):
        compare(model, held)
    allowed = compare(model, held + new, allow_overlap=True)
    assert len(allowed.base.tokens) == 12 and (allowed.overlap.overlapping, allowed.overlap.left_out) == (6, 0)
    assert "could not be checked" not in caplog.text


def test_it_is_said_once_that_overlap_could_not_be_checked(model_with_memory, caplog):
    comparison = compare(model_with_memory, examples(), batch_size=1)
    assert not comparison.overlap.checked
    assert caplog.text.count("could not be checked") == 1


def test_the_memory_in_force_is_the_one_whose_references_count(model):
    held, _ = held_and_new(model)
    attach_memory(model, full_memory(model, examples=(90, 91, 92), seed=8), "other")
    assert compare(model, held).overlap.left_out == 0
    set_memory(model, "default")
    with pytest.raises(ValueError, match="holds all 6"):
        compare(model, held)


def test_a_window_that_comes_ten_times_is_one_in_the_interval(model):
    _, new = held_and_new(model)
    often = compare(model, new[:3] * 10, batch_size=4)
    assert often.change().windows == 3 and often.change().low is None and often.change("hits").high is None
    assert often.change().mean == pytest.approx(compare(model, new[:3]).change().mean, abs=1e-5)
    twice = compare(model, new * 2)
    assert twice.change().windows == 6
    once = compare(model, new).change()
    assert twice.change().high - twice.change().low == pytest.approx(once.high - once.low, rel=0.05)


METRIC = """
import datasets
import evaluate


class {name}(evaluate.Metric):
    def _info(self):
        number = datasets.Value("int64")
        features = datasets.Features({{"predictions": number, "references": number}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        hits = sum(p == r for p, r in zip(predictions, references))
        return {{"{key}": {formula}}}
"""


def metric(folder, name: str, key: str, formula: str) -> str:
    path = folder / f"{key}.py"
    path.write_text(METRIC.format(name=name, key=key, formula=formula))
    return str(path)


def test_combined_metrics_of_the_evaluate_library_take_the_models_outputs(tmp_path, model_with_memory, tokens):
    scripts = [metric(tmp_path, "Share", "share", "hits / len(references)"), metric(tmp_path, "Hits", "hits", "hits")]
    loaded = [evaluate.load(script, cache_dir=str(tmp_path / "cache")) for script in scripts]
    combined = evaluate.combine(loaded)
    with torch.no_grad():
        for batch in tokens.split(2):
            logits = model_with_memory(input_ids=batch).logits
            predictions, references = logits.argmax(-1)[:, :-1].flatten(), batch[:, 1:].flatten()
            references[::3] = predictions[::3]
            combined.add_batch(predictions=predictions, references=references)
    result = combined.compute()
    assert result["hits"] >= 11 and result["share"] == pytest.approx(result["hits"] / 33)
