"""A memory of a tiny OLMoE, and a folder that it was saved to."""

import pytest

from tests.memory.helpers import full_memory, tiny_tokenizer
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def memory():
    return full_memory(tiny_model("olmoe"), tokenizer=tiny_tokenizer())


@pytest.fixture
def folder(memory, tmp_path):
    memory.save_pretrained(tmp_path / "memory")
    return tmp_path / "memory"
