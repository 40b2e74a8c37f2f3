"""Tables of rows on disk give the same as tensors."""

import pytest
import torch

from knnmoe_hf.lookup.blocks import Derived, blocks, in_memory, picked
from knnmoe_hf.training.row_files import InterleavedRows, RowFile, on_disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_rows_of_several_files_are_interleaved(tmp_path, dtype):
    rows = torch.randint(-9, 9, (23, 3), generator=torch.Generator().manual_seed(0)).to(dtype)
    turns = [(0, 5), (1, 4), (0, 0), (0, 7), (2, 0), (1, 7)]
    files, start = [RowFile(tmp_path) for _ in range(3)], 0
    for index, count in turns:
        files[index].append(rows[start : start + count])
        start += count
    table = InterleavedRows(files, turns)
    assert len(table) == 23 and table.shape == (23, 3)
    for part in (slice(None), slice(0, 1), slice(4, 6), slice(3, 17), slice(20, 99), slice(9, 9), slice(30, 40)):
        assert torch.equal(table[part], rows[part]) and table[part].dtype == dtype
    assert torch.equal(torch.cat(list(blocks(table, 4))), rows.float())
    some = torch.tensor([0, 3, 4, 11, 22])
    assert torch.equal(torch.cat(list(picked(table, some, 4))), rows[some].float())
    doubled = Derived(table, 3, lambda block: 2 * block)
    assert torch.equal(doubled[3:9], 2 * rows[3:9]) and doubled.shape == (23, 3)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_another_width_or_dtype_are_refused(tmp_path):
    file = RowFile(tmp_path)
    file.append(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"rows of 4 torch.float32 follow rows of 3 torch.float32: "):
        file.append(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="torch.float16 follow"):
        file.append(torch.zeros(2, 3, dtype=torch.float16))
    with pytest.raises(EOFError, match="2 were written"):
        file.read(1, torch.zeros(2, 3))


@pytest.mark.parametrize("shape", [(4, 3), (5,), (0, 3)])
def test_a_tensor_on_disk_can_be_written_and_read(tmp_path, shape):
    for allocate in (in_memory, on_disk(tmp_path)):
        tensor = allocate(shape, torch.float16)
        tensor.fill_(1.5)
        assert tensor.shape == shape and tensor.dtype == torch.float16 and bool((tensor == 1.5).all())
    assert list(tmp_path.iterdir()) == []
