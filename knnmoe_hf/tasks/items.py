"""A question with its choices, as token ids."""

from dataclasses import dataclass

from knnmoe_hf.data.batches import IGNORED


@dataclass(frozen=True)
class Prompt:
    """
    What a method may know of a question that it is to answer.

    Attributes:
        id: unique within a run, such as `"mmlu_anatomy/test/17"`.
        tokens: ids of the prompt with its template, without the answer.
        text: of the question; two questions are compared by it.
        group: the subject, or any other group that results are reported for.
    """

    id: str
    tokens: tuple[int, ...]
    text: str
    group: str = ""


@dataclass(frozen=True)
class Item:
    """
    A question with its answer: a reference, or a test item whose answer no method sees.

    Attributes:
        prompt: the question.
        choices: token ids of each choice, as they follow the prompt; one for a text that has no other choices.
        answer: index of the right one.
    """

    prompt: Prompt
    choices: tuple[tuple[int, ...], ...]
    answer: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """Ids of the prompt and the right choice."""
        return self.prompt.tokens + self.choices[self.answer]

    def row(self, number: int, answer_only: bool = False) -> dict:
        """
        As `prepare_dataset` returns it, with every token as a target.

        Args:
            number: its `example_id`.
            answer_only: make the right choice the only target.
        """
        ids = list(self.tokens)
        labels = [IGNORED] * len(self.prompt.tokens) + list(self.choices[self.answer]) if answer_only else list(ids)
        return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids), "example_id": number}


def rows_of(items: "list[Item] | tuple[Item, ...]", answer_only: bool = False) -> list[dict]:
    """The rows of several items, numbered in their order."""
    return [item.row(number, answer_only) for number, item in enumerate(items)]


def text_items(rows: "list[dict] | tuple[dict, ...]") -> list[Item]:
    """Texts as items: a row's tokens before its first target are the prompt, all others the only choice."""
    items = []
    for number, row in enumerate(rows):
        ids, labels = list(row["input_ids"]), list(row["labels"])
        start = next((at for at, label in enumerate(labels) if label != IGNORED), len(ids))
        items.append(Item(Prompt(str(number), tuple(ids[:start]), ""), (tuple(ids[start:]),), 0))
    return items
