"""Memories are registered with transformers and lm-evaluation-harness, whatever was imported first."""

import importlib
import importlib.util
import subprocess
import sys

import pytest

import knnmoe_hf  # noqa: F401
from knnmoe_hf.registration import _AfterImport


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Path of a module that can be imported as `imported_later`."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    path = tmp_path / "imported_later.py"
    path.write_text("loaded = True")
    yield path
    sys.modules.pop("imported_later", None)


@pytest.fixture
def calls(module):
    """Grows by one at each call after the import of `imported_later`."""
    found = []
    sys.meta_path.insert(0, _AfterImport("imported_later", lambda: found.append(sys.modules["imported_later"].loaded)))
    return found


def test_the_function_is_called_once_after_the_import(calls):
    before = len(sys.meta_path)
    assert calls == []
    import imported_later

    importlib.reload(imported_later)
    assert calls == [True]
    assert len(sys.meta_path) == before - 1


def test_looking_the_module_up_does_not_use_the_call_up(calls):
    for _ in range(2):
        assert importlib.util.find_spec("imported_later").name == "imported_later"
    assert calls == []
    importlib.import_module("imported_later")
    assert calls == [True]


def test_an_import_that_failed_does_not_use_the_call_up(calls, module):
    module.write_text("raise RuntimeError('not yet')")
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module("imported_later")
    assert calls == []
    module.write_text("loaded = True  # of another size than before, so that no cached byte code is used")
    importlib.import_module("imported_later")
    assert calls == [True]


def test_a_module_that_does_not_exist_is_reported_as_ever(calls, module):
    module.unlink()
    with pytest.raises(ModuleNotFoundError, match="imported_later"):
        importlib.import_module("imported_later")
    assert calls == []


def test_other_modules_are_left_to_other_finders(calls):
    assert _AfterImport("imported_later", list).find_spec("json") is None


# the harness registers its own model types when the first one is looked up, and only if there are none
REGISTERED = "import lm_eval.api.registry as r; r.get_model('dummy'); assert {'hf', 'knnmoe'} <= set(r.model_registry)"
CHECKED = "assert lm_eval.evaluator.evaluate.__name__ == 'evaluate' != lm_eval.evaluator.evaluate.__code__.co_name"


@pytest.mark.parametrize(
    "code",
    [
        f"import knnmoe_hf, lm_eval.evaluator; {REGISTERED}; {CHECKED}",
        f"import lm_eval.evaluator, knnmoe_hf; {REGISTERED}; {CHECKED}",
        "import knnmoe_hf.evaluation, lm_eval.api.registry as r; assert r.get_model('knnmoe').__name__ == 'KNNMoELM'",
        "import knnmoe_hf, sys; assert not {'lm_eval', 'evaluate'} & set(sys.modules)",
        f"import lm_eval.models, knnmoe_hf; {REGISTERED}",
        "import knnmoe_hf, lm_eval.models, sys; assert not {'torch', 'transformers'} & set(sys.modules)",
    ],
)
def test_the_harness_knows_memories_and_neither_library_is_imported_for_the_other(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_type_that_the_harness_found_as_a_plugin_is_kept():
    code = """
import importlib.metadata, lm_eval.api.registry as registry
(found,) = importlib.metadata.EntryPoint("knnmoe", "knnmoe_hf.evaluation.harness:KNNMoELM", "lm_eval.models"),
registry.model_registry.register("knnmoe", target=found)
import knnmoe_hf, lm_eval.models
assert registry.model_registry._objs["knnmoe"] is found
"""
    subprocess.run([sys.executable, "-c", code], check=True)
