"""Every form of a row, and that no column of one is left out without a word."""

import numpy as np
import pandas
import pytest
import torch

from tests.data.forms import ASSISTANT, CHAT, IDS, SHAREGPT, TOOLS, USER, labels, read, refused, text_and_targets
from tests.support.tokenizers import PLAIN, byte_tokenizer

# which column is used, and which is refused


@pytest.mark.parametrize(
    "row, unused",
    [
        ({"text": "a", "topic": 1}, "topic"),
        ({"text": "a", "tools": TOOLS}, "tools"),
        ({"text": "a", "labels": [1]}, "labels"),
        ({"input_ids": IDS, "special_tokens_mask": [0] * 6}, "special_tokens_mask"),
        ({"input_ids": IDS, "length": 6}, "length"),
        ({"input_ids": IDS, "tools": TOOLS}, "tools"),
        ({"prompt": "a", "completion": "b", "label": True}, "label"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "system"),
        ({"prompt": "a", "completion": "b", "tools": TOOLS}, "tools"),
        ({"prompt": "a", "completion": "b", "chat_template_kwargs": {"style": "x"}}, "chat_template_kwargs"),
        ({"messages": CHAT, "completion_mask": [1]}, "completion_mask"),
        ({"messages": CHAT, "images": []}, "images"),
        ({"instruction": "a", "output": "b", "category": "qa"}, "category"),
    ],
)
def test_a_column_that_would_not_be_used_is_refused_until_it_is_ignored(row, unused):
    tokenizer = byte_tokenizer(PLAIN)
    message = refused(row, tokenizer)
    assert f"'{unused}'" in message and f"ignore_columns=['{unused}'] (--ignore-columns {unused})" in message
    assert refused(row, tokenizer, skip_bad_rows=True) == message  # it is so in every row
    assert len(read(row, tokenizer, ignore_columns=[unused])) == 1


@pytest.mark.parametrize(
    "row, ignored",
    [
        ({"text": "a", "input_ids": IDS}, "input_ids"),
        ({"text": "a", "messages": CHAT}, "messages"),
        ({"text": "a", "instruction": "b", "output": "c"}, "text"),
        ({"prompt": "a", "messages": CHAT}, "prompt"),
        ({"input_ids": IDS, "messages": CHAT}, "messages"),
        ({"messages": CHAT, "conversations": SHAREGPT}, "conversations"),
        ({"instruction": "a", "output": "b", "response": "c"}, "response"),
        ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "context"),
        ({"text": "a", "body": "b"}, "text"),
    ],
)
def test_two_forms_in_one_row_are_refused_by_name(row, ignored):
    tokenizer = byte_tokenizer(PLAIN)
    options = {"text_field": "body"} if "body" in row else {}
    message = refused(row, tokenizer, **options)
    assert f"'{ignored}'" in message and "ignore_columns=[" in message
    assert len(read(row, tokenizer, ignore_columns=[ignored], **options)) == 1


def test_the_text_may_be_in_any_column_and_none_counts_as_missing():
    tokenizer = byte_tokenizer()
    row = {"body": "abc", "text": None, "tools": float("nan"), "input_ids": pandas.NA}
    assert text_and_targets(row, tokenizer, text_field="body") == ("abc", "abc")
    assert text_and_targets({"completion": "abc"}, tokenizer, text_field="completion") == ("abc", "abc")
    assert "dataset_text_field (--text-column)" in refused({"body": "abc"}, tokenizer)
    assert "'prompt' and 'completion'" in refused({"prompt": "a", "completion": "b"}, tokenizer, text_field="prompt")


# token ids, and masks that decide the targets


@pytest.mark.parametrize(
    "columns, wanted",
    [
        ({"completion_mask": [0, 0, 1, 1, 1, 1]}, [-100, -100, 13, 14, 15, 16]),
        ({"assistant_masks": [0, 1, 1, 0, 0, 1]}, [-100, 12, 13, -100, -100, 16]),
        (
            {"completion_mask": [0, 0, 1, 1, 1, 1], "assistant_masks": [1, 1, 1, 1, 0, 0]},
            [-100, -100, 13, 14, -100, -100],
        ),
        (
            {"completion_mask": [0, 0, 1, 1, 1, 1], "labels": [11, 12, 13, -100, 15, 16]},
            [-100, -100, 13, -100, 15, 16],
        ),
        ({"completion_mask": np.array([0, 1, 1, 1, 1, 1], bool)}, [-100, 12, 13, 14, 15, 16]),
        ({"attention_mask": [1, 1, 1, 1, 0, 0], "labels": IDS}, [11, 12, 13, 14, -100, -100]),
        ({"attention_mask": torch.tensor([True] * 4 + [False] * 2)}, [11, 12, 13, 14, -100, -100]),
        ({"token_type_ids": [0] * 6}, IDS),
    ],
)
def test_a_token_is_a_target_only_if_all_masks_say_so(columns, wanted):
    assert labels({"input_ids": IDS} | columns) == [wanted]


@pytest.mark.parametrize(
    "columns, named",
    [
        ({"completion_mask": [0, 1]}, "'completion_mask' has 2 values for 6 input_ids"),
        ({"assistant_masks": [0, 1, 2, 0, 0, 0]}, "'assistant_masks' has the value 2"),
        ({"attention_mask": [1, 1, 1, 2, 2, 2]}, "'attention_mask' has the value 2"),
        ({"attention_mask": [0] * 6}, "0 for every token"),
        ({"attention_mask": [1.0] * 6}, "'attention_mask' has 1.0"),
        ({"token_type_ids": [0, 0, 1, 1, 1, 1]}, "'token_type_ids'"),
        ({"labels": [1, 2]}, "'labels' has 2 values"),
        ({"labels": [-1] * 6}, "'labels' has -1 at place 0"),
        ({"labels": [11, 12, 13, 14, 15, None]}, "'labels' has None at place 5"),
        ({"input_ids": []}, "'input_ids' is empty"),
        ({"input_ids": [[1, 2]]}, "without a batch dimension"),
        ({"input_ids": torch.zeros(1, 6, dtype=torch.long)}, "without a batch dimension"),
        ({"input_ids": [1.0, 2.0]}, "'input_ids' has 1.0 at place 0"),
        ({"input_ids": np.array([1, np.nan])}, "'input_ids' has 1.0 at place 0"),
        ({"input_ids": [1, True]}, "'input_ids' has True at place 1"),
        ({"input_ids": ["1"]}, "'input_ids' has '1' at place 0"),
        ({"input_ids": "1 2"}, "'input_ids' is '1 2'"),
        ({"input_ids": 5}, "'input_ids' is 5"),
        ({"input_ids": [3, -1]}, "'input_ids' has -1 at place 1"),
        ({"input_ids": [3, 2**40]}, "'input_ids' has 1099511627776 at place 1"),
    ],
)
def test_columns_of_other_types_lengths_and_values_are_refused(columns, named):
    assert named in refused({"input_ids": IDS} | columns)


@pytest.mark.parametrize("column", ["input_ids", "labels"])
def test_ids_outside_of_the_vocabulary_are_refused(column):
    row = {"input_ids": IDS, "labels": IDS} | {column: [11, 12, 13, 14, 15, 96]}
    assert f"column '{column}' has 96 at place 5, outside of the model's vocabulary of 96" in refused(
        row, vocab_size=96
    )
    assert len(read(row, vocab_size=97)) == 1


@pytest.mark.parametrize("row", [{"text": "~~~"}, {"prompt": "a", "completion": "~"}, {"messages": CHAT}])
def test_a_tokenizer_of_another_model_is_told_from_a_bad_row(row):
    message = refused(row, byte_tokenizer(PLAIN), vocab_size=20, skip_bad_rows=True)
    assert "outside of the model's vocabulary of 20: it is of another model" in message


# packed rows


@pytest.mark.parametrize(
    "columns",
    [
        {"position_ids": [0, 1, 2, 0, 1, 0]},
        {"seq_lengths": [3, 2, 1]},
        {"seq_lengths": [3, 0, 2, 1]},
        {"cu_seq_lens": [0, 3, 5, 6]},
        {"cu_seqlens": torch.tensor([0, 3, 5, 6, 6])},
        {"cu_seq_lens_q": [0, 3, 5, 6], "cu_seq_lens_k": [0, 3, 5, 6], "max_length_q": 3, "max_length_k": 3},
        {"seq_idx": [4, 4, 4, 0, 0, 9]},
        {"position_ids": [0, 1, 2, 0, 1, 0], "seq_lengths": [3, 2, 1], "seq_idx": [0, 0, 0, 1, 1, 2]},
    ],
)
def test_a_packed_row_is_its_documents(columns):
    row = {"input_ids": IDS, "completion_mask": [0, 1, 1, 0, 1, 1]} | columns
    found = read(row)
    assert [example["input_ids"] for example in found] == [[11, 12, 13], [14, 15], [16]]
    assert [example["labels"] for example in found] == [[-100, 12, 13], [-100, 15], [16]]


@pytest.mark.parametrize(
    "columns, wanted",
    [
        ({"position_ids": [0, 1, 0, 1, 1, 1], "attention_mask": [1, 1, 1, 1, 0, 0]}, [[11, 12], [13, 14]]),
        ({"position_ids": [1, 1, 0, 1, 0, 1], "attention_mask": [0, 0, 1, 1, 1, 1]}, [[13, 14], [15, 16]]),
        ({"seq_lengths": [2, 2, 2], "attention_mask": [1, 1, 1, 1, 0, 0]}, [[11, 12], [13, 14]]),
        (
            {"seq_lengths": [3, 3], "position_ids": [0, 1, 9, 0, 1, 9], "attention_mask": [1, 1, 0, 1, 1, 0]},
            [[11, 12], [14, 15]],
        ),
        ({"position_ids": [0, 1, 2, 3, 4, 5]}, [IDS]),
    ],
)
def test_padding_of_a_packed_row_is_no_document(columns, wanted):
    assert [example["input_ids"] for example in read({"input_ids": IDS} | columns)] == wanted


@pytest.mark.parametrize(
    "columns, named",
    [
        ({"position_ids": [1, 2, 3, 4, 5, 6]}, "'position_ids' has 1 at place 0"),
        ({"position_ids": [0, 1, 2, 1, 2, 3]}, "'position_ids' has 1 at place 3"),
        ({"position_ids": [0, 1, 2]}, "'position_ids' has 3 values"),
        ({"position_ids": [0.0] * 6}, "'position_ids' has 0.0"),
        ({"seq_lengths": [3, 2]}, "adds up to 5 for 6"),
        ({"seq_lengths": [8, -2]}, "adds up to 6"),
        ({"seq_lengths": 6}, "'seq_lengths' is 6"),
        ({"cu_seq_lens": [0, 3, 5]}, "'cu_seq_lens' does not rise from 0 to 6"),
        ({"cu_seq_lens_q": [3, 6]}, "'cu_seq_lens_q' does not rise"),
        ({"cu_seqlens": [0, 5, 3, 6]}, "'cu_seqlens' does not rise"),
        ({"cu_seqlens": []}, "'cu_seqlens' does not rise"),
        ({"seq_idx": [0, 0, 1, 1, 0, 0]}, "document 0 in two pieces"),
        ({"position_ids": [0, 1, 2, 0, 1, 2], "seq_lengths": [2, 4]}, "'position_ids' and 'seq_lengths' put borders"),
        ({"cu_seq_lens_q": [0, 3, 6], "cu_seq_lens_k": [0, 6]}, "put borders"),
        ({"cu_seq_lens_q": [0, 2, 6], "max_length_q": 6}, "'max_length_q' is 6"),
    ],
)
def test_borders_that_are_none_or_disagree_are_refused(columns, named):
    assert named in refused({"input_ids": IDS} | columns)


@pytest.mark.parametrize(
    "columns, named",
    [
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "why"}, "'messages' is 'why'"),
        ({"messages": ["why"]}, "messages[0] is 'why'"),
        ({"messages": [{"content": "why"}]}, "messages[0] has no role"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no content"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages[1] has an empty content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0] has the content 5"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content part {'type': 'image'}"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "content part 'a'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "weight": 0}]}]}, "['weight']"),
        ({"messages": [{"role": "user", "content": []}]}, "empty content"),
        ({"messages": [USER, ASSISTANT | {"weight": 0}]}, "keys ['weight'] of messages[1] would decide"),
        ({"messages": [USER, ASSISTANT | {"train": False}]}, "keys ['train'] of messages[1] would decide"),
        ({"messages": [USER, ASSISTANT | {"thinking": "hm"}]}, "keys ['thinking'] of messages[1] are not used"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{"name": "add"}]}]}, "keys ['tool_calls']"),
        ({"conversations": [{"from": "human", "value": "why", "weight": 1}]}, "keys ['weight'] of conversations[0]"),
        ({"conversations": [{"from": "human", "value": "why", "markdown": 1}]}, "keys ['markdown']"),
        ({"conversations": [{"from": "narrator", "value": "why"}]}, "is from 'narrator'"),
        ({"conversations": [{"from": "human"}]}, "conversations[0] has no content"),
        ({"conversations": [{"from": "human", "content": "why"}]}, "has the keys ['content', 'from']"),
        ({"messages": CHAT, "system": 5}, "'system' is 5"),
        ({"messages": CHAT, "tools": "{"}, "'tools' is no JSON"),
        ({"messages": CHAT, "tools": {"name": "add"}}, "'tools' is {'name': 'add'}"),
        ({"messages": CHAT, "tools": [1]}, "'tools' is [1]"),
        ({"messages": CHAT, "chat_template_kwargs": [1]}, "'chat_template_kwargs' is [1]"),
        ({"messages": CHAT, "chat_template_kwargs": {"add_generation_prompt": True}}, "a build sets itself"),
        ({"prompt": [], "completion": [ASSISTANT]}, "'prompt' is empty"),
        ({"prompt": [USER], "completion": []}, "'completion' is empty"),
        ({"prompt": "a", "completion": " "}, "'completion' is empty"),
        ({"prompt": "", "completion": "a"}, "'prompt' is empty"),
        ({"prompt": "a"}, "'completion' is missing"),
        ({"prompt": "a", "completion": None}, "'completion' is missing"),
        ({"prompt": "a", "completion": 4}, "str and int"),
        ({"instruction": "a"}, "'output' and 'response' are missing"),
        ({"instruction": "a", "output": ""}, "'output' is empty"),
        ({"instruction": "a", "input": 4, "output": "b"}, "'input' is 4"),
        ({"text": ""}, "'text' is empty"),
        ({"text": " \n"}, "'text' is empty"),
        ({"text": 5}, "'text' is 5"),
        ({"text": float("nan")}, "'text' is missing"),
        ({"text": pandas.NA}, "'text' is missing"),
        ({"text": ["a", "b"]}, "'text' is ['a', 'b']"),
        ({"text": b"a"}, "'text' is b'a'"),
        ({"text": "\ud800"}, "the tokenizer does not take column 'text'"),
        ({"text": None}, "'text' is missing"),
        ({}, "it has no columns"),
    ],
)
def test_rows_without_a_text_or_with_something_else_are_refused(columns, named):
    assert named in refused(columns, byte_tokenizer(PLAIN))
