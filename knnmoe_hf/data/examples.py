"""Rows of a data set into examples: token ids and labels."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
from torch.utils.data import IterableDataset

from knnmoe_hf.data.batches import IGNORED, as_list
from knnmoe_hf.errors import shown

_FORMS = "text, input_ids, prompt and completion, or messages"
_COLUMNS = ["input_ids", "labels", "attention_mask", "example_id"]
_MARKS_TARGETS = re.compile(r"\{%[-+]?\s*generation\b")


def prepare_dataset(dataset, tokenizer, max_length: int | None):
    """
    Converts a dataset to rows `{"input_ids", "labels", "attention_mask", "example_id"}`.

    Args:
        dataset: a Dataset or IterableDataset of `datasets` or torch, or any sequence of rows; a row is one of
            `{"text"}`, `{"input_ids", "labels"}`, `{"prompt", "completion"}`, `{"messages"}`. It may have an integer
            `example_id`, which is its index by default. A column whose value is None counts as missing.
        tokenizer: needed unless rows have `input_ids`.
        max_length: longer examples are cut to so many tokens; None cuts none.

    Returns:
        A dataset of the same kind, or a list for other sequences.

    Raises:
        ValueError: for a row of another form, or a row of text without a tokenizer.
    """

    def prepare(row: Mapping[str, Any], index: int) -> dict[str, list[int] | int]:
        tokenized = tokenize_row(row, tokenizer)
        cut = {name: column[:max_length] for name, column in tokenized.items()}
        example_id = row.get("example_id")
        return cut | {"example_id": int(example_id if example_id is not None else index)}

    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(
            f"a DatasetDict of {shown(list(dataset))} is not allowed: pass one of its splits, as in dataset['train']."
        )
    if isinstance(dataset, datasets.Dataset):
        return dataset.map(prepare, with_indices=True, remove_columns=dataset.column_names)
    if isinstance(dataset, datasets.IterableDataset):  # `column_names` may be unknown here
        return dataset.map(prepare, with_indices=True).select_columns(_COLUMNS)
    if isinstance(dataset, IterableDataset):
        return _PreparedStream(dataset, prepare)
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"{shown(dataset)} has no length: pass a list, a Dataset or an IterableDataset.")
    return [prepare(dataset[index], index) for index in range(len(dataset))]


class _PreparedStream(IterableDataset):
    """Converts the rows of a stream one by one."""

    def __init__(self, dataset: IterableDataset, prepare):
        self.dataset, self.prepare = dataset, prepare

    def __iter__(self) -> Iterator[dict]:
        return (self.prepare(row, index) for index, row in enumerate(self.dataset))


def tokenize_row(row: Mapping[str, Any], tokenizer) -> dict[str, list[int]]:
    """`{"input_ids", "labels", "attention_mask"}` of a row of any of the four forms; a label of -100 is no target."""
    if not isinstance(row, Mapping):
        raise ValueError(f"the row {shown(row)} is not allowed: give a dict with {_FORMS}.")
    row = {name: value for name, value in row.items() if value is not None}
    if "input_ids" in row:
        ids = as_list(row["input_ids"])
        mask = as_list(row.get("attention_mask", [1] * len(ids)))
        labels = as_list(row["labels"]) if "labels" in row else [i if m else IGNORED for i, m in zip(ids, mask)]
        if not len(ids) == len(labels) == len(mask):
            lengths = f"{len(ids)} input_ids, {len(labels)} labels and an attention_mask of {len(mask)}"
            raise ValueError(f"a row has {lengths}: give lists of the same length.")
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}
    if not ("text" in row or "messages" in row or {"prompt", "completion"} <= set(row)):
        raise ValueError(f"a row with the columns {shown(sorted(row))} is not allowed: give {_FORMS}.")
    if tokenizer is None:
        raise ValueError("rows of text need a tokenizer: pass processing_class, or rows of input_ids and labels.")
    if "text" in row:
        ids = tokenizer(row["text"])["input_ids"]
        labels = list(ids)
    elif "messages" in row:
        ids, labels = _conversation(row["messages"], tokenizer)
    else:
        ids, labels = _completion(row["prompt"], row["completion"], tokenizer)
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def _conversation(messages: list[dict], tokenizer) -> tuple[list[int], list[int]]:
    """
    Token ids and labels of a conversation.

    Targets are the assistant's tokens if the chat template marks them with `{% generation %}`, otherwise all tokens.
    """
    _check_template(tokenizer)
    marked = _MARKS_TARGETS.search(tokenizer.get_chat_template()) is not None
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=marked)
    ids = encoded["input_ids"]
    if not marked:
        return ids, list(ids)
    return ids, [i if by_assistant else IGNORED for i, by_assistant in zip(ids, encoded["assistant_masks"])]


def _completion(prompt: str | list[dict], completion: str | list[dict], tokenizer) -> tuple[list[int], list[int]]:
    """
    Token ids and labels of a prompt and its completion.

    Targets are the completion's tokens. A completion given as text ends with the tokenizer's end-of-sequence token.
    """
    if isinstance(prompt, str) != isinstance(completion, str):
        kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
        raise ValueError(f"prompt and completion are {kinds}: give both as text or both as messages.")
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = tokenizer(prompt + completion)["input_ids"]
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = ids + [tokenizer.eos_token_id]
    else:
        _check_template(tokenizer)
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(prompt + completion, return_dict=True)["input_ids"]
    common = 0  # length of the common prefix, without a token that spans both texts: it counts as completion
    while common < min(len(prompt_ids), len(ids)) and prompt_ids[common] == ids[common]:
        common += 1
    return ids, [IGNORED] * common + ids[common:]


def _check_template(tokenizer) -> None:
    if not tokenizer.chat_template:
        raise ValueError("messages need a tokenizer with a chat_template: set it, or give rows of another form.")
