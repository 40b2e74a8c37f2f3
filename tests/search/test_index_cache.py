"""Indexes of saved keys: cached outside of the memory, found again, and never used for other keys."""

import json
import os
import time

import pytest
import torch

from knnmoe_hf import native
from knnmoe_hf.search import SearchOptions, StoredKeys, build_engine, engine_class
from tests.search.helpers import clustered, same, stored_as

CACHED = ["faiss", "hnsw", "ivf"]
ROWS = 4200


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KNNMOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "indexes"


def saved(seed: int = 0, source: str | None = "the content's digest") -> StoredKeys:
    """Keys as if they were opened from a file: another tensor each time."""
    stored = stored_as(clustered(ROWS, 8, seed=seed)[0], torch.int8)
    return StoredKeys(stored.codes, stored.step, source)


def answer(keys: StoredKeys, backend: str, **options):
    """What a new engine over these keys finds."""
    built = build_engine(keys, SearchOptions(search_backend=backend, **options))
    return built.search(keys.floats(slice(None, None, 100)) + 0.1, 5)


def forbid_building(monkeypatch, backend: str) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("an index was built")

    if backend == "ivf":  # whose constructor reads an index as well
        monkeypatch.setattr(engine_class("native_ivf"), "_fit", refuse)
    else:
        monkeypatch.setattr(engine_class(backend), "__init__", refuse)


@pytest.mark.parametrize("backend", CACHED)
def test_an_index_is_built_once(backend, cache, monkeypatch):
    first = answer(saved(), backend)
    assert len(list(cache.iterdir())) == 1
    forbid_building(monkeypatch, backend)
    assert same(answer(saved(), backend), first)


def test_the_index_in_torch_is_cached_too(cache, monkeypatch):
    monkeypatch.setattr(native, "kernels", None)
    first = answer(saved(), "ivf")
    monkeypatch.setattr(engine_class("ivf"), "_fit", None)
    assert same(answer(saved(), "ivf"), first) and len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("backend", CACHED)
def test_other_keys_get_an_index_of_their_own(backend, cache):
    answer(saved(), backend)
    other = saved(seed=7, source="another digest")
    assert same(answer(other, backend), answer(saved(seed=7, source=None), backend))
    assert len(list(cache.iterdir())) == 2


def metadata_of(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


@pytest.mark.parametrize("backend", CACHED)
def test_a_foreign_or_damaged_index_under_its_name_is_replaced(backend, cache):
    answer(saved(seed=7, source="another digest"), backend)
    foreign = next(cache.iterdir()).read_bytes()
    wanted = answer(saved(), backend)
    mine = next(path for path in cache.iterdir() if path.read_bytes() != foreign)
    whole = mine.read_bytes()
    flipped = bytearray(whole)
    flipped[-2000:-1900] = b"\xff" * 100
    for damaged in (foreign, whole[:-40], bytes(flipped)):
        mine.write_bytes(damaged)
        assert same(answer(saved(), backend), wanted)
        assert metadata_of(mine.read_bytes()) == metadata_of(whole)


def test_an_index_of_another_format_or_library_is_not_found(cache, monkeypatch):
    for backend, name in (("ivf", "native_ivf"), ("hnsw", "hnsw")):
        answer(saved(), backend)
        monkeypatch.setattr(engine_class(name), "index_format", 99)
        answer(saved(), backend)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
    answer(saved(), "hnsw")
    assert len(list(cache.iterdir())) == 5
    monkeypatch.setattr("knnmoe_hf.version.__version__", "99")
    answer(saved(), "hnsw")
    assert len(list(cache.iterdir())) == 5


def test_keys_that_are_not_saved_leave_no_index(cache):
    answer(saved(source=None), "faiss")
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_costs_only_the_time(cache, caplog):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text("no folder")
    answer(saved(), "ivf")
    assert "cannot be cached" in caplog.text


def test_options_of_one_engine_are_nothing_to_another(cache):
    for options in (dict(), dict(hnsw_m=4), dict(num_neighbors=8)):
        answer(saved(), "hnsw", **options)
    assert len(list(cache.iterdir())) == 2
    for options in (dict(), dict(hnsw_m=4), dict(num_neighbors=8)):
        answer(saved(), "ivf", **options)
    assert len(list(cache.iterdir())) == 4


DAY = 24 * 3600


def set_age(path, days: float) -> None:
    os.utime(path, times=(time.time() - days * DAY,) * 2)


def age(path) -> float:
    """In days."""
    return (time.time() - path.stat().st_mtime) / DAY


def test_indexes_that_were_not_used_for_long_are_deleted_when_another_is_cached(cache):
    answer(saved(source="old"), "ivf")
    old = next(cache.iterdir())
    answer(saved(source="recent"), "ivf")
    recent = next(path for path in cache.iterdir() if path != old)
    unfinished, other = cache / f".{old.name}-abc", cache / "another.file"
    for path in (unfinished, other):
        path.touch()
    for path, days in ((old, 91), (recent, 89), (unfinished, 91), (other, 91)):
        set_age(path, days)
    answer(saved(), "ivf")
    assert not old.exists() and not unfinished.exists()
    assert other.exists() and age(recent) > 88 and len(list(cache.iterdir())) == 3


def test_an_index_that_is_read_is_in_use(cache, monkeypatch):
    answer(saved(source="mine"), "ivf")
    mine = next(cache.iterdir())
    set_age(mine, 1000)
    with monkeypatch.context() as patch:
        forbid_building(patch, "ivf")
        answer(saved(source="mine"), "ivf")
    assert age(mine) < 500
    answer(saved(), "ivf")
    assert mine.exists()


def test_a_cache_that_is_read_only_is_read(cache, monkeypatch, caplog):
    def refuse(*args, **kwargs):
        raise PermissionError

    first = answer(saved(), "ivf")
    set_age(next(cache.iterdir()), 1000)
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refuse)
        forbid_building(patch, "ivf")
        assert same(answer(saved(), "ivf"), first)
    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    answer(saved(source="another digest"), "ivf")
    assert len(list(cache.iterdir())) == 2 and not caplog.text
