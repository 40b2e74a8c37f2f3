"""`search_backend="auto"`: which engine, and that the log says why."""

import logging
import sys
import types

import pytest
import torch

from knnmoe_hf.search import SearchOptions, StoredKeys, build_engine, engines
from knnmoe_hf.search.auto import choose


def keys(rows: int, width: int = 8, device: str = "cpu") -> StoredKeys:
    return StoredKeys(torch.empty(rows, width, dtype=torch.int8, device=device), torch.ones(width))


@pytest.fixture
def no_native_code(monkeypatch):
    monkeypatch.setattr("knnmoe_hf.native.kernels", None)
    monkeypatch.setattr("knnmoe_hf.native.fast", False)


@pytest.fixture
def no_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it fails


def test_few_rows_are_searched_exactly():
    assert choose(keys(2048))[0] == "torch"
    assert choose(keys(2**20, device="meta"))[0] == "torch"


def test_many_rows_get_native_lists():
    assert choose(keys(2049)) == ("ivf", "more than 2,048 rows on a CPU with native code")


def test_without_native_code_faiss_where_it_is_installed(no_native_code):
    reason = "more than 2,048 rows on a CPU without fast native code, and faiss is installed"
    assert choose(keys(2049)) == ("faiss", reason)


def test_without_faiss_a_graph_where_it_is_not_too_large(no_native_code, no_faiss):
    assert choose(keys(2049))[0] == "hnsw"
    name, reason = choose(keys(200_000, 2048))
    assert name == "ivf" and "1,590 MiB" in reason and "faiss-cpu" in reason


def test_a_folder_of_that_name_is_not_faiss(no_native_code, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", types.ModuleType("faiss"))
    assert choose(keys(2049))[0] == "hnsw"


def test_an_accelerator_takes_lists_of_very_long_memories_only():
    assert choose(keys(2**20 + 1, device="meta"))[0] == "ivf"


def test_the_log_says_once_what_was_chosen_and_why(caplog):
    caplog.set_level(logging.INFO, logger="knnmoe_hf.search")
    engines.log_once.cache_clear()  # other tests of this process may have made it say so
    table = torch.randn(2051, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        build_engine(StoredKeys(table), SearchOptions())
        build_engine(StoredKeys(table[:300]), SearchOptions(search_backend="faiss"))
        build_engine(StoredKeys(table[:300]), SearchOptions(search_backend="hnsw"))
    assert [record.getMessage() for record in caplog.records] == [
        "search_backend='auto' uses NativeIvfSearch: more than 2,048 rows on a CPU with native code",
        "search_backend='faiss' uses TorchSearch: FaissSearch is for at least 1,024 rows",
        "search_backend='hnsw' uses HnswSearch: as asked for",
    ]
