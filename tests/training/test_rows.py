"""Rows and provenance of a build do not depend on batches, padding or the kind of dataset."""

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset

from knnmoe_hf import KNNMoETrainer, KNNMoETrainingArguments, RoutingMemory
from tests.support.models import tiny_model

IDS = [[5, 6, 7, 8, 9], [11, 12, 13], [21, 22, 23, 24]]


def build(folder, rows, batch_size: int = 2, **options) -> RoutingMemory:
    args = KNNMoETrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        builder_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = KNNMoETrainer(model=tiny_model("olmoe"), args=args, train_dataset=rows)
    trainer.train()
    return trainer.memory


def described(memory: RoutingMemory) -> tuple:
    """All of a memory's provenance that is not a measurement."""
    source = memory.provenance
    tokens = {example: ids.tolist() for example, ids in source.tokens().items()}
    return source.example_ids.tolist(), source.positions.tolist(), tokens, memory.origin.reference_set_hash


def test_provenance_has_example_position_and_tokens(tmp_path):
    rows = [{"input_ids": ids, "example_id": 10 + i} for i, ids in enumerate(IDS)]
    examples, positions, tokens, _ = described(build(tmp_path, rows))
    assert examples == [10] * 4 + [11] * 2 + [12] * 3 and positions == [0, 1, 2, 3, 0, 1, 0, 1, 2]
    assert tokens == dict(zip((10, 11, 12), IDS))


def test_an_example_without_a_target_leaves_no_trace_whatever_batch_it_is_in(tmp_path):
    rows = [{"input_ids": IDS[0]}, {"input_ids": IDS[1], "labels": [-100] * 3}, {"input_ids": IDS[2]}]
    alone, together = build(tmp_path, rows, batch_size=1), build(tmp_path, rows, batch_size=3)
    assert described(alone) == described(together)
    assert list(alone.provenance.tokens()) == [0, 2]


@pytest.mark.parametrize("left, right", [(2, 0), (0, 2), (1, 1)])
def test_padding_of_a_row_leaves_no_trace(left, right, tmp_path):
    padded = {"input_ids": [0] * left + IDS[0] + [0] * right, "attention_mask": [0] * left + [1] * 5 + [0] * right}
    assert described(build(tmp_path, [padded])) == described(build(tmp_path, [{"input_ids": IDS[0]}]))


def test_other_tokens_labels_or_order_change_the_digest(tmp_path):
    rows = [{"input_ids": IDS[0]}, {"input_ids": IDS[1]}]
    labelled = [{"input_ids": IDS[0], "labels": [-100, *IDS[0][1:-1], -100]}, rows[1]]
    edited = [{"input_ids": [4, *IDS[0][1:]]}, rows[1]]
    hashes = {described(build(tmp_path, kind))[3] for kind in (rows, labelled, edited, rows[::-1])}
    assert len(hashes) == 4


class Stream(IterableDataset):
    def __iter__(self):
        return iter([{"input_ids": ids} for ids in IDS])


def test_a_stream_builds_what_a_list_builds(tmp_path):
    rows = [{"input_ids": ids} for ids in IDS]
    expected = build(tmp_path, rows)
    for stream in (Stream(), datasets.Dataset.from_list(rows).to_iterable_dataset()):
        memory = build(tmp_path, stream, max_steps=2)
        assert described(memory) == described(expected)
        for layer, found in memory.layers.items():
            assert torch.equal(found.decoded_values, expected.layers[layer].decoded_values)


def test_an_example_id_that_comes_twice_is_refused(tmp_path):
    rows = [{"input_ids": IDS[0], "example_id": 3}, {"input_ids": IDS[1], "example_id": 3}]
    for batch_size in (1, 2):
        with pytest.raises(ValueError, match="example_id 3 comes twice"):
            build(tmp_path, rows, batch_size)


def test_a_dataset_without_a_target_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no example has a target token"):
        build(tmp_path, [{"input_ids": IDS[0], "labels": [-100] * 5}, {"input_ids": [1]}])


def test_a_stream_without_a_row_is_refused(tmp_path):
    empty = datasets.Dataset.from_list([{"input_ids": IDS[0]}]).to_iterable_dataset().take(0)
    with pytest.raises(ValueError, match="no example has a target token"):
        build(tmp_path, empty, max_steps=1)
