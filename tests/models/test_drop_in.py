"""Tools that never import this library load memories, once Python imports it for them."""

import subprocess
import sys

import pytest

from tests.models.test_auto import save_base, save_memory

TOOL = """
import sys
from transformers import AutoModelForCausalLM, pipeline

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
text = pipeline("text-generation", model=sys.argv[1])("w1 w2 w3", max_new_tokens=2, do_sample=False)
hooks = any(module._forward_hooks for module in model.modules())
print(type(model).__name__, hooks, text[0]["generated_text"][:8])
"""
BY_RUNPY = "import knnmoe_hf, runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture
def tool(tmp_path):
    (tmp_path / "tool.py").write_text(TOOL)
    return tmp_path / "tool.py"


@pytest.fixture
def saved(tmp_path) -> str:
    return save_memory(tmp_path / "memory", save_base(tmp_path / "base"))


def run(words: list[str]) -> str:
    found = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    return (found.stdout or found.stderr).strip().splitlines()[-1]


def test_a_line_in_site_packages_makes_every_tool_know_memories(tool, saved, tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "knnmoe_hf.pth").write_text("import knnmoe_hf\n")
    # Python reads .pth files in site-packages; here in a folder that is treated like it
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(tmp_path / 'site')!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "start"), prepend=":")
    assert run([str(tool), saved]) == "OlmoeForCausalLM True w1 w2 w3"


def test_one_tool_is_run_with_the_library_imported_first(tool, saved):
    assert run(["-c", BY_RUNPY, str(tool), saved]) == "OlmoeForCausalLM True w1 w2 w3"


@pytest.mark.slow
def test_without_it_transformers_does_not_know_memories(tool, saved):
    assert "OlmoeForCausalLM" not in run([str(tool), saved])
