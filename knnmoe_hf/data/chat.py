"""Conversations into token ids, by a tokenizer's chat template; nothing of them is left out without a word."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from knnmoe_hf.data.columns import Refusal, as_plain, ignoring, with_values
from knnmoe_hf.errors import in_one_line, shown

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
"""Roles of messages by what ShareGPT's `from` calls them."""

_LOSS_KEYS = {
    "weight",
    "weights",
    "train",
    "training",
    "trainable",
    "train_detail",
    "loss",
    "loss_mask",
    "loss_weight",
    "mask",
    "masked",
}
"""Keys of a message by which other tools decide whether it is learnt."""

_NOT_RENDERED = {"tool_call_id"}  # says which call a tool answers, which the order says too
_OWN_ARGUMENTS = {  # arguments of apply_chat_template that are not variables of the template
    "conversation",
    "messages",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "sanitize_control_tokens",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
}
_WORD = "whateverthesystemsays"
_MARKS_TARGETS = re.compile(r"\{%[-+]?\s*generation\b")


@dataclass(frozen=True)
class Template:
    """
    A tokenizer's chat template, with what a row gives it beside the messages.

    Args:
        tokenizer: has a chat template.
        tools: as JSON schemas.
        variables: of the template, from `chat_template_kwargs`.

    Raises:
        Refusal: for a template that would leave out tools or variables.
    """

    tokenizer: Any
    tools: list[dict] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not getattr(self.tokenizer, "chat_template", None):
            raise Refusal(
                "messages need a tokenizer with a chat_template",
                "set it, or give rows of another form",
                in_every_row=True,
            )
        unused = [name for name in self.variables if not self.mentions(name)]
        if reserved := sorted(_OWN_ARGUMENTS & set(self.variables)):
            raise Refusal(f"chat_template_kwargs have {shown(reserved)}, which a build sets itself", "leave them out")
        if unused:
            raise Refusal(
                f"the chat template has no variable {shown(unused)} of chat_template_kwargs", "leave them out"
            )
        if self.tools and not self.mentions("tools"):
            way_out = f"use a template that has them, or leave them out with {ignoring(['tools'])}"
            raise Refusal("the chat template leaves out the column 'tools'", way_out, in_every_row=True)

    @property
    def source(self) -> str:
        """The template's text, that for tools if the tokenizer has several."""
        return self.tokenizer.get_chat_template(tools=self.tools)

    def mentions(self, word: str) -> bool:
        """Whether the template's text has this word."""
        return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", self.source) is not None

    @property
    def marks_targets(self) -> bool:
        """Whether the template marks what the assistant says, with `{% generation %}`."""
        return _MARKS_TARGETS.search(self.source) is not None

    def tokens(self, messages: list[dict], **options) -> dict[str, list[int]]:
        """`input_ids`, and `assistant_masks` if `options` ask for them."""
        self._check_system(messages)
        return self._apply(messages, return_dict=True, **options)

    def _apply(self, messages: list[dict], **options) -> Any:
        try:
            given = {"tools": self.tools} if self.tools else {}
            return self.tokenizer.apply_chat_template(messages, **given, **self.variables, **options)
        except Exception as error:  # templates raise errors of their own, and any other
            raise Refusal(
                f"the chat template does not take it ({in_one_line(error)})", "correct the messages"
            ) from error

    def _check_system(self, messages: list[dict]) -> None:
        """Many templates know no system message, and some of them leave it out instead of raising an error."""
        for message in messages:
            if message["role"] == "system" and isinstance(message.get("content"), str) and message["content"].strip():
                # a plain word, because templates may escape or trim what they write
                others = [one | {"content": _WORD} if one is message else one for one in messages]
                if _WORD not in self._apply(others, tokenize=False):
                    reason = f"the chat template leaves out the system message {shown(message['content'])}"
                    raise Refusal(reason, "use a template that has it, or leave the message out")


def conversation(messages: list[dict], template: Template) -> tuple[list[int], list[bool]]:
    """
    Token ids of a conversation, and which are targets.

    Targets are the assistant's tokens if the template marks them, otherwise all tokens.
    """
    if not template.marks_targets:
        ids = template.tokens(messages)["input_ids"]
        return ids, [True] * len(ids)
    encoded = template.tokens(messages, return_assistant_tokens_mask=True)
    return encoded["input_ids"], [bool(one) for one in encoded["assistant_masks"]]


def completion(prompt: list[dict], answer: list[dict], template: Template) -> tuple[list[int], list[bool]]:
    """
    Token ids of a prompt and its completion, and which are targets: those of the completion.

    What the template puts before an answer (its generation prompt) is not a target.
    """
    ids = template.tokens(prompt + answer)["input_ids"]
    asked = template.tokens(prompt, add_generation_prompt=True)["input_ids"]
    start = common_start(asked, ids)
    if start < len(asked):
        alone = template.tokens(prompt)["input_ids"]
        if start < len(alone) - 1:  # the last token may span both
            raise Refusal(
                "the chat template renders the prompt in another way when the completion follows it, so that its "
                "end cannot be found",
                "give the row as messages, or another chat_template",
            )
    return ids, [place >= start for place in range(len(ids))]


def common_start(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of leading tokens that are the same."""
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return length


def as_messages(value: Any, column: str, ignored: frozenset[str], template: Template) -> list[dict]:
    """
    Messages `{"role", "content", ...}`, from such messages or from ShareGPT's `{"from", "value"}`.

    Raises:
        Refusal: for a message without a role or a text, or with a key that the template does not know.
    """
    value = as_plain(value)
    if isinstance(value, Mapping):  # a list of structs, as older versions of `datasets` give it
        columns = {name: as_plain(part) for name, part in value.items()}
        if not columns or not all(isinstance(part, list) for part in columns.values()):
            raise Refusal(f"column {column!r} is {shown(value)}", "give a list of messages")
        value = [dict(zip(columns, parts)) for parts in zip(*columns.values())]
    if not isinstance(value, (list, tuple)):
        raise Refusal(f"column {column!r} is {shown(value)}", "give a list of messages")
    if not value:
        raise Refusal(f"column {column!r} is empty", "give at least one message")
    return [_message(one, f"{column}[{place}]", ignored, template) for place, one in enumerate(value)]


def _message(given: Any, place: str, ignored: frozenset[str], template: Template) -> dict:
    if not isinstance(given, Mapping):
        raise Refusal(f"{place} is {shown(given)}", "give a dict with role and content")
    message = _without_none(with_values(given, ignored))
    if "tool_calls" in message and "content" in given:
        message.setdefault("content", "")  # None, which templates would write as a word
    if "from" in message or "value" in message:
        message = _of_sharegpt(message, place)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role.strip():
        raise Refusal(f"{place} has no role", "give role and content, or from and value")
    unknown = [
        name
        for name in message
        if name in _LOSS_KEYS or not (name in {"role", "content"} | _NOT_RENDERED or template.mentions(name))
    ]
    if unknown:
        use = "would decide what is learnt" if set(unknown) <= _LOSS_KEYS else "are not used by the chat template"
        way_out = f"leave them out with {ignoring(unknown)}"
        raise Refusal(f"keys {shown(unknown)} of {place} {use}", way_out, in_every_row=True)
    if isinstance(content, list):
        message["content"] = content = _joined(content, place)
    _check_content(content, place, role, silent="tool_calls" in message)
    return message


def _joined(parts: list, place: str) -> str:
    """The text of a content in parts, because most templates would write a list as Python does."""
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refusal(f"{place} has the content part {shown(part)}", "give text")
        if unknown := sorted(set(part) - {"type", "text"}):
            raise Refusal(f"keys {shown(unknown)} of a content part of {place} are not used", "leave them out")
    return "".join(part["text"] for part in parts)


def _of_sharegpt(turn: dict, place: str) -> dict:
    if "role" in turn or "content" in turn:
        raise Refusal(f"{place} has the keys {shown(sorted(turn))}", "give role and content, or from and value")
    said_by, value = turn.pop("from", None), turn.pop("value", None)
    if said_by not in SHAREGPT_ROLES:
        raise Refusal(f"{place} is from {shown(said_by)}", f"use one of {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[said_by], "content": value} | turn


def _check_content(content: Any, place: str, role: str, silent: bool) -> None:
    if content is None:
        if not silent:
            raise Refusal(f"{place} has no content", "give text")
    elif not isinstance(content, str):
        raise Refusal(f"{place} has the content {shown(content)}", "give text")
    elif not content.strip() and role in ("user", "assistant") and not silent:
        raise Refusal(f"{place} has an empty content", "give text")


def as_tools(value: Any) -> list[dict] | None:
    """Tools as JSON schemas, from a list of them or its JSON text; None if there are none."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except ValueError as error:
            raise Refusal(
                f"column 'tools' is no JSON ({in_one_line(error)})", "give a list of JSON schemas"
            ) from error
    else:
        value = _without_none(as_plain(value))
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise Refusal(f"column 'tools' is {shown(value)}", "give a list of JSON schemas, or its JSON text")
    return value or None


def as_variables(value: Any) -> dict[str, Any]:
    """Variables of a template by name; those that are None are left out."""
    if not isinstance(value, Mapping):
        raise Refusal(f"column 'chat_template_kwargs' is {shown(value)}", "give a dict of the template's variables")
    return {name: part for name, part in value.items() if part is not None}


def _without_none(value: Any) -> Any:
    """Without the keys that a table of `datasets` adds, with None, so that all its structs have the same ones."""
    value = as_plain(value)
    if isinstance(value, Mapping):
        return {name: _without_none(part) for name, part in value.items() if part is not None}
    return [_without_none(part) for part in value] if isinstance(value, (list, tuple)) else value
