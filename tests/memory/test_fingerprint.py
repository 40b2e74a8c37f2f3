"""The form of a fingerprint in a memory's folder; `tests/models/test_fingerprint.py` compares those of models."""

import json

import pytest

from knnmoe_hf.memory.fingerprint import is_fingerprint, same_gates, tokenizer_fingerprint
from knnmoe_hf.models.fingerprint import fingerprint
from knnmoe_hf.models.gates import find_gates
from tests.support.models import tiny_model
from tests.support.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def found():
    return fingerprint(find_gates(tiny_model("olmoe")))


def test_a_fingerprint_survives_json(found):
    stored = json.loads(json.dumps(found))
    assert stored == found and is_fingerprint(stored) and same_gates(stored, found)


@pytest.mark.parametrize("name", ["float32", "projections", "norms"])
@pytest.mark.parametrize("value", [None, -1, {}, ["x"], [["x"]]], ids=str)
def test_a_malformed_fingerprint_is_recognised_as_such(found, name, value):
    assert not is_fingerprint(found | {name: value})
    assert not is_fingerprint({key: item for key, item in found.items() if key != name})


def test_a_tokenizer_is_recognised_by_its_vocabulary_and_special_tokens():
    digest = tokenizer_fingerprint(byte_tokenizer())
    assert digest == tokenizer_fingerprint(byte_tokenizer(chat_template="{{ messages }}"))
    assert digest != tokenizer_fingerprint(byte_tokenizer(eos=False))
    more = byte_tokenizer()
    more.add_tokens(["word"])
    assert digest != tokenizer_fingerprint(more)
