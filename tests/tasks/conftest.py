"""The lab model's tokenizer, a folder for data sets, and a place of its own for what `datasets` caches."""

import datasets
import pytest

pytest.importorskip("lm_eval")

from transformers import AutoTokenizer

from knnmoe_hf.lab import LAB_MODELS
from tests.support.tokenizers import GENERATING


@pytest.fixture(scope="package", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="package")
def tokenizer():
    return AutoTokenizer.from_pretrained(LAB_MODELS["olmoe"])


@pytest.fixture(scope="package")
def chatty():
    """The same tokenizer with a template of chats."""
    tokenizer = AutoTokenizer.from_pretrained(LAB_MODELS["olmoe"])
    tokenizer.chat_template = GENERATING
    return tokenizer


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, in which data sets of the Hub may be folders; what is cached of them stays in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cached")
    return tmp_path
