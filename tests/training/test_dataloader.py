"""Which batches each of several processes loads."""

from types import SimpleNamespace

import pytest

from knnmoe_hf.data.batches import collate
from knnmoe_hf.distributed import Processes
from knnmoe_hf.training.arguments import KNNMoETrainingArguments
from knnmoe_hf.training.dataloader import batch_loader
from tests.training.build_in_processes import Stream


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("rows, size, processes", [(21, 2, 2), (20, 4, 3), (1, 2, 2), (12, 3, 2), (5, 8, 4)])
def test_processes_take_turns_at_whole_batches_and_take_equally_many_steps(rows, size, processes, stream, tmp_path):
    dataset = [{"input_ids": [i], "labels": [i], "attention_mask": [1], "example_id": i} for i in range(rows)]
    args = KNNMoETrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=size, use_cpu=True, dataloader_pin_memory=False
    )
    loaders = [
        batch_loader(
            Stream(dataset) if stream else dataset,
            collate,
            args,
            SimpleNamespace(index=index, count=processes, gather=lambda value: [value]),
        )
        for index in range(processes)
    ]
    taken = [[batch["example_id"].tolist() for batch in loader] for loader in loaders]
    assert len(set(map(len, taken))) == 1
    assert stream or len(loaders[0]) == len(taken[0])
    in_turn = [batch for round_of_all in zip(*taken) for batch in round_of_all if batch]
    assert in_turn == [list(range(start, min(start + size, rows))) for start in range(0, rows, size)]


def test_an_iterable_dataset_with_several_workers_is_refused(tmp_path):
    args = KNNMoETrainingArguments(output_dir=str(tmp_path), use_cpu=True, dataloader_num_workers=2)
    with pytest.raises(ValueError, match=r"dataloader_num_workers=2 is not allowed.*iterable dataset.*use 0 or 1\.$"):
        batch_loader(Stream([]), collate, args, Processes())
