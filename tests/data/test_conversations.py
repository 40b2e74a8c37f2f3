"""Conversations, tools, prompts with completions, instructions: each reaches the template whole."""

import datasets
import pytest

from tests.data.forms import (
    ASSISTANT,
    CHAT,
    NO_SYSTEM,
    SHAREGPT,
    TOOLS,
    USER,
    WITH_STYLE,
    WITH_TOOLS,
    read,
    refused,
    text_and_targets,
)
from tests.support.tokenizers import GENERATING, MARKED, byte_tokenizer


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
