"""A calibrated memory and a folder of it, for tests of its manifest."""

import shutil
from dataclasses import replace

import pytest

from knnmoe_hf import RoutingMemory
from tests.memory.helpers import calibration_record, full_memory, tiny_tokenizer
from tests.memory.manifest.helpers import STATS
from tests.support.models import tiny_model
from tests.support.stats import with_stats


@pytest.fixture(scope="module")
def calibrated() -> RoutingMemory:
    encoding = dict(key_codec="pca", key_dim=8, key_dtype="int8", value_dtype="int8", value_experts=2)
    memory = full_memory(tiny_model("olmoe"), tokenizer=tiny_tokenizer(), confidence="calibrated", **encoding)
    return replace(with_stats(memory, **STATS), calibration=calibration_record())


@pytest.fixture(scope="module")
def saved(calibrated, tmp_path_factory):
    calibrated.save_pretrained(tmp_path_factory.mktemp("saved"))
    return next(tmp_path_factory.getbasetemp().glob("saved*"))


@pytest.fixture
def folder(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "memory")
    return tmp_path / "memory"
