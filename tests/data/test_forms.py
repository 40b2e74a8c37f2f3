"""Every form of a row, and that no column of one is left out without a word."""

import datasets
import numpy as np
import pandas
import pytest
import torch

from knnmoe_hf.data.reading import RowReader
from knnmoe_hf.errors import BadRowError
from tests.support.tokenizers import GENERATING, MARKED, PLAIN, byte_tokenizer

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


# conversations


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"messages": {"role": ["user", "assistant"], "content": ["why", "so"]}},
        {"conversations": SHAREGPT},
        {"conversation": SHAREGPT},
        {"messages": SHAREGPT},
        {"conversations": CHAT},
    ],
)
def test_conversations_of_every_kind_reach_the_template(row):
    tokenizer = byte_tokenizer(MARKED)
    assert text_and_targets(row, tokenizer) == ("<user>why;<assistant>so;", "so;")


def test_a_system_column_is_the_first_message():
    tokenizer = byte_tokenizer(MARKED)
    for row in ({"conversations": SHAREGPT, "system": "be brief"}, {"messages": CHAT, "system": "be brief"}):
        assert text_and_targets(row, tokenizer) == ("<system>be brief;<user>why;<assistant>so;", "so;")
    assert text_and_targets({"messages": CHAT, "system": ""}, tokenizer)[0] == "<user>why;<assistant>so;"
    twice = {"messages": [{"role": "system", "content": "a"}, *CHAT], "system": "b"}
    assert "two system messages" in refused(twice, tokenizer)
    assert "leaves out the system message" in refused(
        {"messages": CHAT, "system": "be brief"}, byte_tokenizer(NO_SYSTEM)
    )


@pytest.mark.parametrize("tools", [TOOLS, '[{"type": "function", "function": {"name": "add"}}]'])
@pytest.mark.parametrize(
    "row",
    [{"messages": CHAT}, {"prompt": [USER], "completion": [ASSISTANT]}, {"instruction": "why", "output": "so"}],
)
def test_tools_and_variables_reach_the_template_or_are_refused(row, tools):
    text = '<tools>[{"type": "function", "function": {"name": "add"}}];<user>why;<assistant>so;'
    assert text_and_targets(row | {"tools": tools}, byte_tokenizer(WITH_TOOLS))[0] == text
    assert text_and_targets(row | {"tools": []}, byte_tokenizer(GENERATING))[0] == text.partition(";")[2]
    assert "leaves out the column 'tools'" in refused(row | {"tools": tools}, byte_tokenizer(GENERATING))
    styled = row | {"chat_template_kwargs": {"style": "short", "other": None}}
    assert text_and_targets(styled, byte_tokenizer(WITH_STYLE))[0].startswith("<short><user>")
    assert "no variable ['style']" in refused(styled, byte_tokenizer(GENERATING))


def test_a_template_for_tools_is_used_where_there_are_some():
    tokenizer = byte_tokenizer({"default": GENERATING, "tool_use": WITH_TOOLS})
    assert text_and_targets({"messages": CHAT, "tools": TOOLS}, tokenizer)[0].startswith("<tools>")
    assert text_and_targets({"messages": CHAT}, tokenizer)[0].startswith("<user>")


def test_what_a_table_fills_with_none_is_no_key():
    rows = datasets.Dataset.from_list(
        [{"messages": [USER, ASSISTANT | {"name": "bot"}], "tools": TOOLS}, {"messages": CHAT, "tools": None}]
    )
    assert rows[1]["messages"][0].keys() == {"role", "content", "name"}
    assert text_and_targets(rows[1], byte_tokenizer(MARKED)) == ("<user>why;<assistant>so;", "so;")


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


def test_a_key_of_messages_can_be_left_out():
    row = {"messages": [USER, ASSISTANT | {"weight": 0}]}
    assert text_and_targets(row, byte_tokenizer(MARKED), ignore_columns=["weight"])[1] == "so;"


def test_an_error_of_the_template_is_one_of_the_row():
    strict = "{{ raise_exception('roles must alternate') }}"
    assert "roles must alternate" in refused({"messages": CHAT}, byte_tokenizer(strict))


def test_a_template_may_escape_what_it_writes():
    escaping = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    row = {"messages": CHAT, "system": "say 'so' & \"why\""}
    assert '\\"why\\"' in text_and_targets(row, byte_tokenizer(escaping))[0]


def test_a_call_of_a_tool_needs_no_content():
    calling = (
        GENERATING + "{% for m in messages %}{{ m['tool_calls'] | tojson if m['tool_calls'] else '' }}{% endfor %}"
    )
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]
    assert text_and_targets({"messages": messages}, byte_tokenizer(calling))[0] == (
        '<user>why;<assistant>;[{"name": "add"}]'
    )


# prompts and completions


@pytest.mark.parametrize("last", [USER, {"role": "tool", "content": "5"}, ASSISTANT])
def test_what_a_template_puts_before_an_answer_is_no_target(last):
    tokenizer = byte_tokenizer(GENERATING)
    row = {"prompt": [USER, last], "completion": [ASSISTANT]}
    text = f"<user>why;<{last['role']}>{last['content']};<assistant>so;"
    assert text_and_targets(row, tokenizer) == (text, "so;")


def test_a_template_that_changes_the_prompt_when_an_answer_follows_is_refused():
    changing = "{{ messages | length }}" + GENERATING
    row = {"prompt": [USER], "completion": [ASSISTANT]}
    assert "renders the prompt in another way" in refused(row, byte_tokenizer(changing))


@pytest.mark.parametrize("second", ["input", "context"])
@pytest.mark.parametrize("third", ["output", "response"])
def test_instructions_are_a_conversation_or_plain_text(second, third):
    row = {"instruction": "why", second: "this", third: "so"}
    assert text_and_targets(row, byte_tokenizer(GENERATING)) == ("<user>why\n\nthis;<assistant>so;", "so;")
    assert text_and_targets(row, byte_tokenizer()) == ("why\n\nthis\n\nso<end>", "so<end>")
    assert text_and_targets(row | {second: ""}, byte_tokenizer())[0] == "why\n\nso<end>"
    styled = row | {"system": "be brief"}
    assert text_and_targets(styled, byte_tokenizer(GENERATING))[0].startswith("<system>be brief;<user>why")
    assert text_and_targets(styled, byte_tokenizer())[0].startswith("be brief\n\nwhy\n\nthis")
    assert "'tools' would not be used without a chat_template" in refused(row | {"tools": TOOLS}, byte_tokenizer())


def test_a_content_in_parts_is_their_text_and_not_how_python_writes_a_list():
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes"}]}
        for content in (parts, "Hello there")
    ]
    assert read(rows[0], byte_tokenizer(MARKED)) == read(rows[1], byte_tokenizer(MARKED))
