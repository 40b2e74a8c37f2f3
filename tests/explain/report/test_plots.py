"""Plots for papers from the figures of a page."""

import sys

import pytest

from knnmoe_hf.explain.report.page import Report
from knnmoe_hf.explain.report.plots import need_matplotlib, write_plots
from tests.explain.report.reports import lab_report
from tests.memory.helpers import full_memory
from tests.support.models import tiny_model

SIGNS = {"pdf": b"%PDF", "png": b"\x89PNG", "svg": b"<?xml"}


def test_each_figure_is_a_file_and_equal_figures_are_equal_files(tmp_path):
    pytest.importorskip("matplotlib")
    report = lab_report()
    made = [write_plots(report, tmp_path / name, "svg") for name in ("one", "two")]
    assert [path.stem for path in made[0]] == list(report.figures())
    assert [path.read_bytes() for path in made[0]] == [path.read_bytes() for path in made[1]]
    sweep = (tmp_path / "one" / "sweep.svg").read_text()
    assert "its threshold on these texts" in sweep and "gain, nats per token" in sweep
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(path.name for path in made[0])


@pytest.mark.parametrize("format", SIGNS)
def test_formats_are_what_they_say(tmp_path, format):
    pytest.importorskip("matplotlib")
    memory = full_memory(tiny_model("olmoe"))
    for path in write_plots(Report(memory, "m"), tmp_path, format):
        assert path.read_bytes().startswith(SIGNS[format])


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="knnmoe_hf\\[plots\\]"):
        need_matplotlib()
