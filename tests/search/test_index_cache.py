"""Indexes of memories on disk: kept outside of them, found again, and never used for other keys."""

import json
import os
import shutil
import time

import pytest
import torch

from knnmoe_hf import RoutingMemory, attach_memory, detach_memory
from knnmoe_hf.models.hooks import RoutingHooks
from knnmoe_hf.search import ENGINES
from tests.conftest import random_memory, tiny_model

ROWS = 1100
INDEXED = [name for name in sorted(ENGINES) if name != "torch"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KNNMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "indexes"


@pytest.fixture(scope="module")
def model():
    return tiny_model("olmoe")


@pytest.fixture
def folder(model, tmp_path):
    random_memory(model, rows=ROWS).save_pretrained(tmp_path / "memory")
    return tmp_path / "memory"


def answers(model, memory):
    """What each layer's engine finds, after the memory was attached."""
    attach_memory(model, memory)
    lookups = RoutingHooks.of(model).current
    found = {
        layer: lookup.engine.search(lookup.rows.decoded_keys[::100] + 0.1, 5) for layer, lookup in lookups.items()
    }
    detach_memory(model)
    return found


def assert_alike(one, other):
    for layer, found in one.items():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, other[layer]))


def nothing_is_built(monkeypatch, name):
    def refuse(*args, **kwargs):
        raise AssertionError("an index was built")

    if name == "ivf":  # whose constructor reads an index as well
        monkeypatch.setattr("knnmoe_hf.search.native_ivf.NativeIvfSearch._fit", refuse)
    else:
        monkeypatch.setattr(ENGINES[name], "__init__", refuse)


@pytest.mark.parametrize("name", INDEXED)
def test_an_index_is_built_once_outside_of_the_memory(name, model, folder, cache, monkeypatch):
    before = sorted(path.name for path in folder.iterdir())
    first = answers(model, RoutingMemory.from_pretrained(folder, search_backend=name))
    assert sorted(path.name for path in folder.iterdir()) == before
    assert len(list(cache.iterdir())) == 2
    nothing_is_built(monkeypatch, name)
    assert_alike(answers(model, RoutingMemory.from_pretrained(folder, search_backend=name)), first)


@pytest.mark.parametrize("name", INDEXED)
def test_another_memory_at_the_same_place_gets_its_own_index(name, model, folder, cache):
    answers(model, RoutingMemory.from_pretrained(folder, search_backend=name))
    other = random_memory(model, rows=ROWS, seed=7)
    other.save_pretrained(folder)
    other.config.search_backend = name
    assert_alike(answers(model, RoutingMemory.from_pretrained(folder, search_backend=name)), answers(model, other))


def test_the_same_memory_at_another_place_finds_its_index(model, folder, cache, tmp_path, monkeypatch):
    first = answers(model, RoutingMemory.from_pretrained(folder, search_backend="faiss"))
    shutil.copytree(folder, tmp_path / "elsewhere")
    nothing_is_built(monkeypatch, "faiss")
    assert_alike(answers(model, RoutingMemory.from_pretrained(tmp_path / "elsewhere", search_backend="faiss")), first)


def metadata_of(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


@pytest.mark.parametrize("name", INDEXED)
def test_another_s_index_under_the_same_name_is_replaced(name, model, folder, cache):
    answers(model, RoutingMemory.from_pretrained(folder, search_backend=name))
    others = {path: path.read_bytes() for path in cache.iterdir()}
    random_memory(model, rows=ROWS, seed=7).save_pretrained(folder)
    wanted = answers(model, RoutingMemory.from_pretrained(folder, search_backend=name))
    mine = {path: path.read_bytes() for path in cache.iterdir() if path not in others}
    assert len(mine) == len(others) == 2
    for path, foreign in zip(mine, others.values()):
        path.write_bytes(foreign)
    assert_alike(answers(model, RoutingMemory.from_pretrained(folder, search_backend=name)), wanted)
    for path, kept in mine.items():
        assert metadata_of(path.read_bytes()) == metadata_of(kept)


@pytest.mark.parametrize("name", INDEXED)
def test_a_spoilt_index_is_built_anew(name, model, folder, cache):
    first = answers(model, RoutingMemory.from_pretrained(folder, search_backend=name))
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-40])
    assert_alike(answers(model, RoutingMemory.from_pretrained(folder, search_backend=name)), first)
    for path in cache.iterdir():
        data = bytearray(path.read_bytes())
        data[-2000:-1900] = b"\xff" * 100
        path.write_bytes(data)
    assert_alike(answers(model, RoutingMemory.from_pretrained(folder, search_backend=name)), first)


def test_rows_that_are_not_those_on_disk_leave_no_index(model, folder, cache):
    memory = RoutingMemory.from_pretrained(folder, search_backend="faiss")
    fewer = memory.take(torch.arange(ROWS) < 1050)
    assert all(rows.source is None for rows in fewer.layers.values())
    answers(model, fewer)
    answers(model, random_memory(model, rows=ROWS, search_backend="faiss"))
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_only_costs_the_time(model, folder, cache, caplog):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("no folder")
    answers(model, RoutingMemory.from_pretrained(folder, search_backend="faiss"))
    assert "is not kept" in caplog.text


def test_options_of_one_engine_are_nothing_to_another(model, folder, cache):
    for options in (dict(), dict(hnsw_m=4), dict(num_neighbors=8)):
        answers(model, RoutingMemory.from_pretrained(folder, search_backend="hnsw", **options))
    assert len(list(cache.iterdir())) == 4
    for options in (dict(), dict(hnsw_m=4), dict(num_neighbors=8)):
        answers(model, RoutingMemory.from_pretrained(folder, search_backend="faiss", **options))
    assert len(list(cache.iterdir())) == 8


def test_memories_of_the_same_rows_share_an_index_while_one_is_attached(model):
    memory = random_memory(model, rows=ROWS, search_backend="faiss")
    attach_memory(model, memory)
    attach_memory(model, memory, name="again")
    engines = [
        [lookup.engine for lookup in RoutingHooks.of(model).named[name].values()] for name in ("default", "again")
    ]
    detach_memory(model)
    assert all(one is other for one, other in zip(*engines))


DAY = 24 * 3600


def set_age(path, days):
    os.utime(path, times=(time.time() - days * DAY,) * 2)


def age(path) -> float:
    """In days."""
    return (time.time() - path.stat().st_mtime) / DAY


def test_indexes_that_were_not_used_for_long_go_when_another_is_kept(model, folder, cache):
    answers(model, RoutingMemory.from_pretrained(folder, search_backend="hnsw"))
    old, recent = sorted(cache.iterdir())
    unfinished, other = cache / f".{old.name}-abc", cache / "another.file"
    for path in (unfinished, other):
        path.touch()
    for path, days in ((old, 91), (recent, 89), (unfinished, 91), (other, 91)):
        set_age(path, days)
    answers(model, RoutingMemory.from_pretrained(folder, search_backend="hnsw", hnsw_m=4))
    assert not old.exists() and not unfinished.exists()
    assert other.exists() and age(recent) > 88 and len(list(cache.iterdir())) == 4


def test_an_index_that_is_read_is_in_use(model, folder, cache, monkeypatch):
    answers(model, RoutingMemory.from_pretrained(folder, search_backend="hnsw"))
    known = list(cache.iterdir())
    for path in known:
        set_age(path, 1000)
    with monkeypatch.context() as patch:
        nothing_is_built(patch, "hnsw")
        answers(model, RoutingMemory.from_pretrained(folder, search_backend="hnsw"))
    assert all(age(path) < 500 for path in known)
    answers(model, RoutingMemory.from_pretrained(folder, search_backend="hnsw", hnsw_m=4))
    assert all(path.exists() for path in known) and len(list(cache.iterdir())) == 4


def test_a_cache_that_can_only_be_read_is_read(model, folder, cache, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise PermissionError

    first = answers(model, RoutingMemory.from_pretrained(folder, search_backend="hnsw"))
    for path in cache.iterdir():
        set_age(path, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refuse)
        nothing_is_built(patch, "hnsw")
        assert_alike(answers(model, RoutingMemory.from_pretrained(folder, search_backend="hnsw")), first)
    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    answers(model, RoutingMemory.from_pretrained(folder, search_backend="hnsw", hnsw_m=4))
    assert len(list(cache.iterdir())) == 4 and not caplog.text
