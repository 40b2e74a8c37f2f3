"""A tiny model in a folder, and a memory of it that the command line built."""

from pathlib import Path

import datasets
import pytest

from knnmoe_hf.cli import main
from tests.cli.helpers import QUICK, TEXTS, texts
from tests.conftest import tiny_model
from tests.support.tokenizers import byte_tokenizer


@pytest.fixture(scope="package", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="package")
def base(tmp_path_factory) -> Path:
    """Folder of a tiny OLMoE with a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("olmoe", vocab_size=260).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="package")
def built(base, tmp_path_factory) -> Path:
    """A memory of `TEXTS`, built from the command line."""
    folder = tmp_path_factory.mktemp("built")
    dataset = texts(folder / "reference.jsonl", TEXTS)
    words = ["build", "--model", str(base), "--dataset", dataset, "--output", str(folder / "memory"), *QUICK]
    assert main([*words, "--gamma", "0.2"]) == 0
    return folder / "memory"


@pytest.fixture
def pushed(hub, built) -> str:
    """A repository of the memory `built`, with the text of its references."""
    assert main(["push", str(built), "me/mem", "--push-provenance", "text", "--quiet"]) == 0
    return "me/mem"
