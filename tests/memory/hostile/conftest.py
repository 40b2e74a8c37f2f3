"""A memory's folder and a file beside it, for tests of folders that a stranger made; none may hang."""

import signal
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KNNMOE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_hang():
    def stop(*_):
        pytest.fail("it hangs")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def victim(tmp_path) -> Path:
    """A file beside the memory's folder, which nothing may read, move or delete."""
    path = tmp_path / "victim"
    path.write_text("private")
    yield path
    assert path.read_text() == "private" and not path.is_symlink()
