"""The layout that docs/layout.md describes: what each folder may import, and that importing is quick."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import knnmoe_hf

PACKAGE = Path(knnmoe_hf.__file__).parent
FOLDERS = [
    "native",
    "search",
    "lookup",
    "data",
    "pages",
    "memory",
    "models",
    "evaluation",
    "calibration",
    "explain",
    "training",
    "lab",
    "tasks",
    "baselines",
    "comparison",
    "cli",
]
"""From the bottom to the top: a folder imports from folders before it, and from modules of the root."""
UPWARD = {
    # what a memory asks of its base model, once it is given one
    "memory/base_model.py": {"models.fingerprint", "models.gates"},
    # a plan of a memory's size makes the model on the meta device; only the command line imports it
    "memory/size.py": {"models.gates"},
}
"""Every import from a folder above, by file."""
HOST = {"transformers", "datasets", "pandas", "peft", "accelerate", "evaluate", "hnswlib", "faiss"}
LONGEST = 300  # lines
LONG = {"training/trainer.py": 340}


def modules() -> dict[str, ast.AST]:
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, also inside functions, but not those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from statements(node)


def imported(tree: ast.AST) -> set[str]:
    """Modules, and names in them as if they were modules."""
    found = set()
    for node in statements(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports are not followed here"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def upward(name: str, tree: ast.AST) -> set[str]:
    """Modules of the folders above that a file imports, as `folder.module`."""
    folder, found = name.partition("/")[0], set()
    for module in imported(tree) if folder in FOLDERS else ():
        package, _, inside = module.partition(".")
        inside = knnmoe_hf._MODULES.get(inside, inside)  # a public name, as `from knnmoe_hf import attach_memory`
        other = inside.partition(".")[0]
        if package == "knnmoe_hf" and other in FOLDERS and FOLDERS.index(other) > FOLDERS.index(folder):
            found.add(".".join(inside.split(".")[:2]))
    whole = {module.partition(".")[0] for module in found if "." in module}  # said more precisely already
    return found - whole


def test_folders_import_only_from_folders_below_them():
    found = {name: found_here for name, tree in modules().items() if (found_here := upward(name, tree))}
    assert found == UPWARD


def test_imports_inside_functions_count_and_those_for_type_checkers_do_not():
    source = """
if TYPE_CHECKING:
    from knnmoe_hf.cli import loading

def inner():
    from knnmoe_hf.models.gates import find_gates
    from knnmoe_hf.data.batches import collate
"""
    assert upward("memory/a.py", ast.parse(source)) == {"models.gates"}
    assert upward("memory/a.py", ast.parse("from knnmoe_hf import attach_memory, models")) == {"models.attach"}
    assert upward("memory/a.py", ast.parse("import knnmoe_hf.models, knnmoe_hf.search")) == {"models"}
    assert upward("training/a.py", ast.parse(source)) == set()


def test_native_search_and_lookup_know_no_host_library():
    allowed = {"search/hnsw.py": {"hnswlib"}, "search/faiss.py": {"faiss"}, "search/auto.py": {"faiss"}}
    for name, tree in modules().items():
        if name.partition("/")[0] in ("native", "search", "lookup"):
            names = {module.partition(".")[0] for module in imported(tree)}
            assert not names & HOST - allowed.get(name, set()), name


def test_the_root_has_at_most_eight_modules_and_no_file_is_long():
    assert len(list(PACKAGE.glob("*.py"))) <= 8
    lines = {name: len((PACKAGE / name).read_text().splitlines()) for name in modules()}
    assert {name: count for name, count in lines.items() if count > LONG.get(name, LONGEST)} == {}


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
