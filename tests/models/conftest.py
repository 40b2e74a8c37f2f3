"""Models with memories: several for tests of several callers, and one that recalls next tokens."""

import pytest

from knnmoe_hf import attach_memory, set_memory
from tests.models.callers import NAMES
from tests.models.recalling import MIXED
from tests.support.models import random_memory, tiny_model


@pytest.fixture
def shared():
    """A model with three memories, of which the first is the default."""
    model = tiny_model("olmoe")
    for seed, name in enumerate(NAMES):
        attach_memory(model, random_memory(model, seed=seed + 1), name)
    set_memory(model, "law")
    return model


@pytest.fixture
def olmoe():
    return tiny_model("olmoe")


@pytest.fixture
def remembering(olmoe):
    """A model with a memory that mixes next tokens and routing."""
    attach_memory(olmoe, random_memory(olmoe, **MIXED))
    return olmoe
