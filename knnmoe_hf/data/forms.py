"""
The forms of a row, each into documents: token ids and which of them are targets.

Every column of a row is used, or refused by name. Which form a row has is told by its columns; two forms in one row
are refused, because one of them would be left out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from knnmoe_hf.data.batches import IGNORED
from knnmoe_hf.data.chat import Template, as_messages, as_tools, as_variables, common_start, completion, conversation
from knnmoe_hf.data.columns import Refusal, as_bits, as_integers, as_text, check_ids, ignoring, named
from knnmoe_hf.data.packed import BORDERS, documents
from knnmoe_hf.data.windows import text_windows
from knnmoe_hf.errors import in_one_line, shown

Result = TypeVar("Result")
FORMS = "input_ids and labels; prompt and completion; messages or conversations; or instruction, input and output"
"""The forms beside text."""

_TURNS = ("messages", "conversations", "conversation")
_INPUTS, _OUTPUTS = ("input", "context"), ("output", "response")
_FOR_TEMPLATE = ("tools", "chat_template_kwargs")
_MASKS = ("completion_mask", "assistant_masks")


@dataclass
class Document:
    """
    One example, not yet cut to a length.

    Attributes:
        ids: token ids.
        labels: as `ids`, -100 for tokens that are not targets.
        mask: 1 for a token, 0 for padding.
    """

    ids: list[int]
    labels: list[int]
    mask: list[int]


@dataclass(frozen=True)
class Reading:
    """
    What rows are read with.

    Attributes:
        tokenizer: None if all rows are token ids.
        text_field: column of the text.
        ignored: columns, and keys of messages, that are left out.
        vocab_size: number of the model's input embeddings; None if it is not known.
        window: tokens of each of the documents that a text is cut into; None leaves texts whole.
    """

    tokenizer: Any
    text_field: str
    ignored: frozenset[str]
    vocab_size: int | None
    window: int | None = None


@dataclass(frozen=True)
class Form:
    """
    A form of rows.

    Attributes:
        main: columns that tell the form.
        beside: other columns that it uses.
        read: makes documents of a row's columns.
    """

    main: tuple[str, ...]
    beside: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Reading], list[Document]]


def read_documents(row: Mapping[str, Any], reading: Reading) -> list[Document]:
    """
    The documents of a row: one, or several of a packed row.

    Args:
        row: columns that have a value, without `example_id`.
        reading: how to read them.

    Raises:
        Refusal: for a row that cannot be used.
        ValueError: for a row of text without a tokenizer.
    """
    forms = _forms(reading.text_field)
    present = [form for form in forms if any(name in row for name in form.main)]
    if not present:
        way_out = (
            f"give {reading.text_field}; {FORMS}; or name the text's column with dataset_text_field (--text-column)"
        )
        raise Refusal(f"the columns {shown(sorted(row))} are none of the forms of a row", way_out, in_every_row=True)
    if len(present) > 1:
        first, second = ([name for name in form.main if name in row] for form in present[:2])
        way_out = f"leave one of them out, as with {ignoring(second)}"
        reason = f"{named([*first, *second])} are two forms in one row"
        raise Refusal(reason, way_out, in_every_row=True)
    form = present[0]
    if unused := [name for name in row if name not in form.main + form.beside]:
        told = named([name for name in form.main if name in row])
        reason = f"{named(unused)} would not be used beside {told}"
        raise Refusal(reason, f"leave {_them(unused)} out with {ignoring(unused)}", in_every_row=True)
    if "input_ids" not in row and reading.tokenizer is None:
        raise ValueError("rows of text need a tokenizer: pass processing_class, or rows of input_ids and labels.")
    return form.read(row, reading)


def _forms(text_field: str) -> list[Form]:
    """All forms; a column that holds the text is of no other form."""
    forms = [
        Form(("input_ids",), ("labels", "attention_mask", "token_type_ids", *_MASKS, *BORDERS), _tokenized),
        Form(("prompt", "completion"), _FOR_TEMPLATE, _prompt_and_completion),
        Form(_TURNS, ("system", *_FOR_TEMPLATE), _conversation),
        Form(("instruction",), (*_INPUTS, *_OUTPUTS, "system", *_FOR_TEMPLATE), _instruction),
    ]
    others = [Form(tuple(name for name in form.main if name != text_field), form.beside, form.read) for form in forms]
    return [Form((text_field,), (), _text), *others]


def _document(ids: list[int], targets: list[bool], column: str, reading: Reading) -> Document:
    """A document of token ids that the tokenizer made."""
    check_ids(ids, reading.vocab_size, column, tokenized_here=True)
    if not ids:
        raise Refusal(f"column {column!r} has no tokens", "give text")
    labels = [token if target else IGNORED for token, target in zip(ids, targets, strict=True)]
    return Document(list(ids), labels, [1] * len(ids))


def _text(row: Mapping[str, Any], reading: Reading) -> list[Document]:
    column = reading.text_field
    text = as_text(row[column], column)
    if reading.window is None:
        found = [_ids_of(text, column, reading)]
    else:
        found = _tokenizing(lambda: text_windows(text, reading.tokenizer, reading.window), column)
    return [_document(ids, [True] * len(ids), column, reading) for ids in found]


def _ids_of(text: str, column: str, reading: Reading) -> list[int]:
    # not verbose: long texts are cut afterwards
    return _tokenizing(lambda: reading.tokenizer(text, verbose=False)["input_ids"], column)


def _tokenizing(work: Callable[[], Result], column: str) -> Result:
    try:
        return work()
    except (TypeError, UnicodeError) as error:  # half of a surrogate pair, for example
        reason = f"the tokenizer does not take column {column!r} ({in_one_line(error)})"
        raise Refusal(reason, "give text that can be written in UTF-8") from error


def _tokenized(row: Mapping[str, Any], reading: Reading) -> list[Document]:
    ids = as_integers(row["input_ids"], "input_ids")
    if not ids:
        raise Refusal("column 'input_ids' is empty", "give token ids")
    check_ids(ids, reading.vocab_size, "input_ids")
    bits = {name: as_bits(row[name], name) for name in ("attention_mask", *_MASKS) if name in row}
    mask = bits.get("attention_mask", [1] * len(ids))
    labels = as_integers(row["labels"], "labels") if "labels" in row else list(ids)
    lengths = {name: len(column) for name, column in ({"labels": labels} | bits).items()}
    if "token_type_ids" in row:
        kinds = as_integers(row["token_type_ids"], "token_type_ids")
        lengths["token_type_ids"] = len(kinds)
        if any(kinds):
            way_out = f"leave it out with {ignoring(['token_type_ids'])}"
            raise Refusal("column 'token_type_ids' has values other than 0, which these models do not use", way_out)
    if wrong := {name: length for name, length in lengths.items() if length != len(ids)}:
        name, length = next(iter(wrong.items()))
        raise Refusal(f"{name!r} has {length} values for {len(ids)} input_ids", "give lists of the same length")
    check_ids([label for label in labels if label != IGNORED], reading.vocab_size, "labels")
    if not any(mask):
        raise Refusal("column 'attention_mask' is 0 for every token", "give 1 for tokens and 0 for padding")
    for column in bits.values():
        labels = [label if target else IGNORED for label, target in zip(labels, column, strict=True)]
    if not any(name in row for name in BORDERS):
        return [Document(ids, labels, mask)]
    found = []
    for part in documents(row, mask):  # without padding, so that their positions are those that the row says
        kept = [place for place in range(part.start, part.stop) if mask[place]]
        found.append(Document([ids[i] for i in kept], [labels[i] for i in kept], [1] * len(kept)))
    return found


def _prompt_and_completion(row: Mapping[str, Any], reading: Reading) -> list[Document]:
    for name in ("prompt", "completion"):
        if name not in row:
            raise Refusal(f"column {name!r} is missing", "give both prompt and completion")
    texts = {name: isinstance(row[name], str) for name in ("prompt", "completion")}
    if len(set(texts.values())) == 2:
        kinds = f"{type(row['prompt']).__name__} and {type(row['completion']).__name__}"
        raise Refusal(f"prompt and completion are {kinds}", "give both as text or both as messages")
    if texts["prompt"]:
        if unused := [name for name in _FOR_TEMPLATE if name in row]:
            reason = f"{named(unused)} would not be used with prompt and completion as text"
            raise Refusal(
                reason, f"give messages, or leave {_them(unused)} out with {ignoring(unused)}", in_every_row=True
            )
        return [_plain_completion(as_text(row["prompt"], "prompt"), as_text(row["completion"], "completion"), reading)]
    template = _template(row, reading)
    prompt, answer = (as_messages(row[name], name, reading.ignored, template) for name in ("prompt", "completion"))
    return [_document(*completion(prompt, answer, template), "completion", reading)]


def _plain_completion(prompt: str, answer: str, reading: Reading, column: str = "completion") -> Document:
    """The answer's tokens are the targets; it ends with the tokenizer's end-of-sequence token."""
    asked, ids = _ids_of(prompt, column, reading), _ids_of(prompt + answer, column, reading)
    end = reading.tokenizer.eos_token_id
    if end is not None and ids[-1:] != [end]:
        ids = [*ids, end]
    start = common_start(asked, ids)  # a token that spans both texts counts as part of the answer
    return _document(ids, [place >= start for place in range(len(ids))], column, reading)


def _conversation(row: Mapping[str, Any], reading: Reading) -> list[Document]:
    columns = [name for name in _TURNS if name in row]
    if len(columns) > 1:
        way_out = f"leave one of them out, as with {ignoring(columns[1:])}"
        raise Refusal(f"{named(columns)} are two conversations in one row", way_out, in_every_row=True)
    column, template = columns[0], _template(row, reading)
    messages = as_messages(row[column], column, reading.ignored, template)
    if said := _system(row):
        if messages[0]["role"] == "system":
            way_out = f"give one of them, as with {ignoring(['system'])}"
            raise Refusal(f"column 'system' and {column}[0] are two system messages", way_out)
        messages = [{"role": "system", "content": said}, *messages]
    return [_document(*conversation(messages, template), column, reading)]


def _instruction(row: Mapping[str, Any], reading: Reading) -> list[Document]:
    output = _one_of(_OUTPUTS, row)
    if output is None:
        raise Refusal("columns 'output' and 'response' are missing", "give an output beside the instruction")
    given = _one_of(_INPUTS, row)
    asked = [as_text(row["instruction"], "instruction")]
    if given is not None and not (isinstance(row[given], str) and not row[given].strip()):  # "" for no input is usual
        asked.append(as_text(row[given], given))
    said, answer = _system(row), as_text(row[output], output)
    if not getattr(reading.tokenizer, "chat_template", None):
        if unused := [name for name in _FOR_TEMPLATE if name in row]:
            reason = f"{named(unused)} would not be used without a chat_template"
            raise Refusal(reason, f"set it, or leave {_them(unused)} out with {ignoring(unused)}", in_every_row=True)
        prompt = "".join(f"{part}\n\n" for part in ([said] if said else []) + asked)
        return [_plain_completion(prompt, answer, reading, output)]
    system = [{"role": "system", "content": said}] if said else []
    prompt = [*system, {"role": "user", "content": "\n\n".join(asked)}]
    reply = [{"role": "assistant", "content": answer}]
    return [_document(*completion(prompt, reply, _template(row, reading)), output, reading)]


def _them(columns: list[str]) -> str:
    return "it" if len(columns) == 1 else "them"


def _one_of(names: tuple[str, ...], row: Mapping[str, Any]) -> str | None:
    present = [name for name in names if name in row]
    if len(present) > 1:
        way_out = f"leave one of them out, as with {ignoring(present[1:])}"
        raise Refusal(f"{named(present)} are the same part of an example", way_out, in_every_row=True)
    return present[0] if present else None


def _system(row: Mapping[str, Any]) -> str | None:
    """The system message; None if it is empty, as it is in tables where some rows have none."""
    said = row.get("system")
    return None if isinstance(said, str) and not said.strip() or said is None else as_text(said, "system")


def _template(row: Mapping[str, Any], reading: Reading) -> Template:
    tools = as_tools(row["tools"]) if "tools" in row else None
    variables = as_variables(row["chat_template_kwargs"]) if "chat_template_kwargs" in row else {}
    return Template(reading.tokenizer, tools, variables)
