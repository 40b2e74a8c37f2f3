"""Rows of some forms, and a row as it is read: its text, its targets, or the sentence that refuses it."""

import pytest

from knnmoe_hf.data.reading import RowReader
from knnmoe_hf.errors import BadRowError
from tests.support.tokenizers import GENERATING

USER, ASSISTANT = {"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}
CHAT = [USER, ASSISTANT]
SHAREGPT = [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]
IDS = [11, 12, 13, 14, 15, 16]
WITH_TOOLS = "{% if tools %}<tools>{{ tools | tojson }};{% endif %}" + GENERATING
WITH_STYLE = "{% if style %}<{{ style }}>{% endif %}" + GENERATING
TOOLS = [{"type": "function", "function": {"name": "add"}}]
NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }};{% endfor %}"


def read(row: dict, tokenizer=None, **options) -> list[dict]:
    return RowReader(tokenizer, None, **options).read(row, "row 17")


def text_and_targets(row: dict, tokenizer, **options) -> tuple[str, str]:
    (example,) = read(row, tokenizer, **options)
    targets = [label for label in example["labels"] if label != -100]
    assert all(label in (-100, one) for label, one in zip(example["labels"], example["input_ids"], strict=True))
    return tokenizer.decode(example["input_ids"]), tokenizer.decode(targets)


def refused(row, tokenizer=None, **options) -> str:
    """The message, one sentence that begins with the place."""
    with pytest.raises(BadRowError) as error:
        read(row, tokenizer, **options)
    message = str(error.value)
    assert message.startswith("row 17: ") and message.endswith(".") and "\n" not in message and ". " not in message
    return message


def labels(row: dict) -> list[list[int]]:
    return [example["labels"] for example in read(row)]
