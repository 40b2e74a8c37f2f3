"""References that equal a test item, or nearly do: what is gained with them says nothing about new questions."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from knnmoe_hf.tasks.items import Item, Prompt
from knnmoe_hf.tasks.splits import normalised

WORDS_OF_ONE_CHANGE, WORDS_PER_CHANGE = 10, 15
"""A question of so many words may differ in one of them; a longer one may differ in one of so many words."""
LONG_QUESTION = 20
"""A question of so many words counts as the same whatever its choices are."""
FEWEST_MASKED = 6
"""A question with so many words besides numbers counts as the same with other numbers; a shorter one is arithmetic."""
_RUN = 3  # words; what two questions have in common is looked for in runs of so many
_COMMON = 50  # test items; a run that more of them have ("which of the following") is not looked at
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class OverlapReport:
    """
    How many references are test items too.

    Attributes:
        equal: references with the words of a test item in the same order; case, spaces and punctuation apart.
        near: those that nearly equal one; see `without_test_items`.
        kept: references that are left.
        pairs: `(id of the reference, id of the test item, "equal" or "near")` of those that are left out.
    """

    equal: int
    near: int
    kept: int
    pairs: tuple[tuple[str, str, str], ...] = ()

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, str, str]], kept: int) -> "OverlapReport":
        """From the pairs, and the number of references that are kept."""
        equal = sum(kind == "equal" for *_, kind in pairs)
        return cls(equal, len(pairs) - equal, kept, tuple(pairs))

    def sentence(self) -> str:
        """The counts as a sentence."""
        total = self.equal + self.near + self.kept
        return (
            f"{self.equal:,} of {total:,} references equal a test item and {self.near:,} nearly do; they are left "
            f"out, and {self.kept:,} are kept"
        )


def without_test_items(references: Sequence[Item], items: Iterable[Item]) -> tuple[list[Item], OverlapReport]:
    """
    Leaves out the references that are test items too.

    Equal are a reference and a test item of the same words (`knnmoe_hf.tasks.splits.normalised`) in question and
    choices. Nearly equal are two whose questions differ, numbers apart, in one word (two of 30 words, three of 45),
    or of which one holds the other; the choices, in any order, must then agree in at least half, unless the question
    has 20 words or more. Questions of fewer than ten words must be the same.

    Args:
        references, items: compared by `Item.prompt.text`, a question and its choices on lines that begin as `"- "`.

    Returns:
        The references that are left, in their order, and what was found.
    """
    tested = Tested(item.prompt for item in items)
    kept, pairs = [], []
    for reference in references:
        found = tested.like(reference.prompt)
        if found is None:
            kept.append(reference)
        else:
            pairs.append((reference.prompt.id, *found))
    return kept, OverlapReport.of(pairs, len(kept))


@dataclass(frozen=True)
class _Question:
    id: str
    text: str  # normalised, with the choices
    words: tuple[str, ...]  # of the question alone, with its numbers
    masked: tuple[str, ...]  # likewise, with all numbers alike where enough other words are there
    choices: frozenset[str]

    @classmethod
    def of(cls, prompt: Prompt) -> "_Question":
        question, choices = [], []
        for line in prompt.text.split("\n"):
            (choices if line.startswith("- ") else question).append(normalised(line))
        words = tuple(" ".join(question).split())
        enough = sum(not any(map(str.isdigit, word)) for word in words) >= FEWEST_MASKED
        masked = tuple(_NUMBER.sub("0", word) for word in words) if enough else words
        return cls(prompt.id, normalised(prompt.text), words, masked, frozenset(choices))

    def runs(self) -> set[tuple[str, ...]]:
        """Of words that follow each other; a shorter question is one run."""
        count = max(len(self.masked) - _RUN + 1, 1)
        return {self.masked[i : i + _RUN] for i in range(count)}


class Tested:
    """
    Test items, by their words.

    Args:
        prompts: of the items.
    """

    def __init__(self, prompts: Iterable[Prompt]):
        self._all = [_Question.of(prompt) for prompt in prompts]
        self._equal = {question.text: question.id for question in reversed(self._all)}
        self._same, self._with_run = defaultdict(list), defaultdict(list)
        for number, question in enumerate(self._all):
            self._same[question.masked].append(number)
            for run in question.runs():
                self._with_run[run].append(number)

    def like(self, prompt: Prompt) -> tuple[str, str] | None:
        """The first test item that a reference equals ("equal") or nearly equals ("near"), and which of the two."""
        question = _Question.of(prompt)
        if not question.words:
            return None
        if question.text in self._equal:
            return self._equal[question.text], "equal"
        candidates = set(self._same.get(question.masked, ()))
        for run in question.runs():
            having = self._with_run.get(run, ())
            candidates.update(having if len(having) <= _COMMON else ())
        for number in sorted(candidates):
            if _nearly_equal(question, self._all[number]):
                return self._all[number].id, "near"
        return None


def _nearly_equal(one: _Question, other: _Question) -> bool:
    short, long = sorted((one.masked, other.masked), key=len)
    if not short or not _agree(one, other, len(short)):
        return False
    if short == long:
        return True
    allowed = max(len(short) // WORDS_PER_CHANGE, len(short) >= WORDS_OF_ONE_CHANGE)
    if not allowed:
        return False
    least = _RUN if len(long) > 2 * len(short) else 1  # single words of a question are in any long text
    blocks = SequenceMatcher(None, short, long, autojunk=False).get_matching_blocks()
    return len(short) - sum(block.size for block in blocks if block.size >= least) <= allowed


def _agree(one: _Question, other: _Question, words: int) -> bool:
    """Whether the choices agree enough: at least half are the same, or the question is long enough by itself."""
    if words >= LONG_QUESTION or not one.choices or not other.choices:
        return True
    return 2 * len(one.choices & other.choices) >= min(len(one.choices), len(other.choices))
