"""What a memory asks of its base model; and that neither it nor a lookup needs transformers to be imported."""

import subprocess
import sys
from pathlib import Path

import torch

from knnmoe_hf.memory.base_model import BaseModel
from knnmoe_hf.models.fingerprint import fingerprint
from knnmoe_hf.models.gates import find_gates
from tests.support.models import tiny_model

ROOT = Path(__file__).parents[2]
BLOCKED = """
import sys
for name in ("transformers", "datasets", "pandas", "peft", "accelerate", "hnswlib"):
    sys.modules[name] = None  # importing it raises ImportError
import knnmoe_hf.lookup, knnmoe_hf.memory
from knnmoe_hf.lookup import torch_lookup
from knnmoe_hf.memory import LayerRows, RoutingMemory
print(sorted(name for name in sys.modules if name.startswith("knnmoe_hf.models")))
"""


def test_memories_and_lookups_are_imported_without_transformers():
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "[]"


def test_a_model_s_class_gates_logits_and_fingerprint(model):
    base, x = BaseModel(model), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert base.class_name == type(model).__name__ and base.name_or_path is None and base.cached_commit() is None
    assert base.fingerprint() == fingerprint(find_gates(model))
    for gate in find_gates(model):
        found = base.gates[gate.layer]
        assert (found.hidden_size, found.num_experts, found.top_k) == (32, 8, 2)
        logits = base.logits(gate.layer, x)
        assert logits.shape == (5, 8)
        torch.testing.assert_close(logits[1:4], gate.module(x)[0][1:4].detach())


def test_a_folder_is_named_by_its_absolute_path_and_a_repository_by_its_name(tmp_path, monkeypatch):
    model = tiny_model("olmoe")
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    model.config.name_or_path = "base"
    assert BaseModel(model).name_or_path == str(tmp_path / "base") and BaseModel(model).cached_commit() is None
    model.config.name_or_path = "me/base"
    assert BaseModel(model).name_or_path == "me/base"
