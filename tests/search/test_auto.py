"""`search_backend="auto"`: which engine, and that the log says why."""

import logging
import sys
import types

import pytest
import torch

from knnmoe_hf import KNNMoEConfig, search
from knnmoe_hf.search import StoredKeys, build_engine
from knnmoe_hf.search.auto import choose


def keys(rows: int, width: int = 8, device: str = "cpu") -> StoredKeys:
    return StoredKeys(torch.empty(rows, width, dtype=torch.int8, device=device), torch.ones(width))


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr("knnmoe_hf.native.kernels", None)
    monkeypatch.setattr("knnmoe_hf.native.fast", False)


@pytest.fixture
def without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it fails


def test_few_rows_are_searched_exactly():
    assert choose(keys(2048))[0] == "torch"
    assert choose(keys(2**20, device="meta"))[0] == "torch"


def test_many_rows_get_compiled_lists():
    assert choose(keys(2049)) == ("ivf", "more than 2,048 rows on cpu, and lookups were compiled for its vectors")


def test_else_faiss_where_it_is_installed(uncompiled):
    assert choose(keys(2049)) == ("faiss", "more than 2,048 rows on cpu, and faiss is installed")


def test_without_faiss_a_graph_where_it_is_not_too_large(uncompiled, without_faiss):
    assert choose(keys(2049))[0] == "hnsw"
    name, reason = choose(keys(200_000, 2048))
    assert name == "ivf" and "1,590 MiB" in reason and "faiss-cpu" in reason


def test_something_else_of_that_name_is_no_faiss(uncompiled, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", types.ModuleType("faiss"))
    assert choose(keys(2049))[0] == "hnsw"


def test_an_accelerator_takes_lists_only_of_very_long_memories():
    assert choose(keys(2**20 + 1, device="meta"))[0] == "ivf"


def test_the_log_says_once_what_was_chosen_and_why(caplog):
    caplog.set_level(logging.INFO, logger="knnmoe_hf.search")
    search.log_once.cache_clear()  # other tests of this process may have made it say so
    table = torch.randn(2051, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        build_engine(StoredKeys(table), KNNMoEConfig())
        build_engine(StoredKeys(table[:300]), KNNMoEConfig(search_backend="faiss"))
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "search_backend='auto': NativeIvfSearch, as more than 2,048 rows on cpu, "
        "and lookups were compiled for its vectors",
        "search_backend='faiss': TorchSearch, as fewer than 1024 rows are searched exactly",
    ]


def test_faiss_that_is_asked_for_and_missing_is_named_with_the_way_out(without_faiss):
    for rows in (10, 3000):
        with pytest.raises(ImportError, match=r"pip install 'knnmoe_hf\[faiss\]', or use 'auto'"):
            build_engine(keys(rows), KNNMoEConfig(search_backend="faiss"))
