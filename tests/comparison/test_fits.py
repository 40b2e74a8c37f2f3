"""Fits are kept for the next run, show how far they are, and clear away what a killed run left."""

import pytest

from knnmoe_hf.baselines import make_method
from knnmoe_hf.comparison.fits import fit_or_load
from tests.baselines.items import random_items
from tests.support.models import tiny_model


def fitted(folder, progress: str | None = None):
    method = make_method("constant_bias", epochs=2, learning_rates=[0.1])
    fit = fit_or_load(method, tiny_model("olmoe"), random_items(4), None, 0, folder, "of", progress)
    return method, fit


def test_a_fit_is_made_once(tmp_path):
    (method, fit), (again, kept) = fitted(tmp_path), fitted(tmp_path)
    assert kept == fit and (fit.forward, fit.backward) == (8, 8)
    assert all(bias.equal(again.state()[name]) for name, bias in method.state().items())


def test_a_fit_shows_how_many_passes_it_has_run(tmp_path, capsys):
    fitted(tmp_path, "fitting constant_bias")
    said = capsys.readouterr().err
    assert "fitting constant_bias" in said and "/8 [" in said
    fitted(tmp_path, "fitting constant_bias")
    assert capsys.readouterr().err == ""


def test_what_a_run_left_that_was_killed_while_it_saved_is_cleared_away(tmp_path):
    (tmp_path / ".unfinished-abc" / "fit").mkdir(parents=True)
    fitted(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_fit_without_its_last_file_is_made_again(tmp_path):
    fitted(tmp_path)
    (place,) = tmp_path.iterdir()
    (place / "fit.json").unlink()
    assert fitted(tmp_path)[1].forward == 8 and (place / "fit.json").exists()


def test_nothing_is_kept_of_a_fit_that_fails(tmp_path):
    with pytest.raises(ValueError, match="too few"):
        fit_or_load(make_method("constant_bias"), tiny_model("olmoe"), random_items(2), None, 0, tmp_path, "of", "x")
    assert not list(tmp_path.iterdir())
