"""The layout that docs/layout.md describes: what each room may import, and that importing is quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import knnmoe_hf

PACKAGE = Path(knnmoe_hf.__file__).parent
ROOMS = ["native", "search", "lookup", "memory", "models", "evaluation", "calibration", "training", "lab", "cli"]
"""From the bottom to the top: a room imports from rooms before it, and from modules of the root."""
# what a memory asks of its base model goes through one module, which imports models/ when a model is looked at;
# training/data.py turns rows of a data set into batches, for everything that runs a model on text
# and a plan of a memory's size asks the model on the meta device, for the command line alone
ALLOWED = {("memory/base_model.py", "models"), ("memory/size.py", "models"), ("*", "training.data")}
HOST = {"transformers", "datasets", "pandas", "peft", "accelerate", "evaluate", "hnswlib", "faiss"}


def modules():
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imported(tree: ast.AST, top_level: bool = False) -> set[str]:
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_rooms_import_only_from_rooms_below_them():
    wrong = []
    for name, tree in modules().items():
        room = name.partition("/")[0]
        if room not in ROOMS:
            continue
        for module in imported(tree, top_level=True):
            parts = module.split(".")
            if parts[0] != "knnmoe_hf" or len(parts) < 2 or parts[1] not in ROOMS or parts[1] == room:
                continue
            if (name, parts[1]) in ALLOWED or ("*", ".".join(parts[1:3])) in ALLOWED:
                continue
            if ROOMS.index(parts[1]) > ROOMS.index(room):
                wrong.append(f"{name} imports {module}")
    assert not wrong


def test_the_token_rooms_know_no_host_library():
    for name, tree in modules().items():
        if name.partition("/")[0] in ("native", "search", "lookup"):
            names = {module.partition(".")[0] for module in imported(tree)}
            allowed = {"search/hnsw.py": {"hnswlib"}, "search/faiss.py": {"faiss"}, "search/auto.py": {"faiss"}}.get(
                name, set()
            )
            assert not names & HOST - allowed, name


def test_the_root_has_at_most_eight_modules_and_no_file_is_long():
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    long = {name: len((PACKAGE / name).read_text().splitlines()) for name in modules()}
    assert {name: lines for name, lines in long.items() if lines > 340} == {}


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, knnmoe_hf; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in knnmoe_hf.__all__:
        assert getattr(knnmoe_hf, name) is not None
    assert set(knnmoe_hf.__all__) <= set(dir(knnmoe_hf))
    with pytest.raises(AttributeError, match="has no attribute 'attach_memories'"):
        knnmoe_hf.attach_memories  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*knnmoe_hf.__all__} - {"__version__"}))
@pytest.mark.parametrize("before", ["", "import transformers; transformers.AutoModelForCausalLM;"])
def test_every_public_name_can_be_imported_first_of_all(name, before):
    code = f"{before} from knnmoe_hf import {name}; from transformers import AutoConfig, AutoModelForCausalLM;"
    code += "import knnmoe_hf; knnmoe_hf.KNNMoEConfig in AutoModelForCausalLM._model_mapping.keys() or sys.exit(1)"
    subprocess.run([sys.executable, "-c", "import sys;" + code], check=True)
