"""The items of a benchmark, tests and references, in exactly the template of the evaluation."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from knnmoe_hf.tasks.documents import Document, reference_documents, test_split
from knnmoe_hf.tasks.encoding import Encoder, Pair
from knnmoe_hf.tasks.examples import without_itself
from knnmoe_hf.tasks.items import Item, Prompt
from knnmoe_hf.tasks.loading import Benchmark
from knnmoe_hf.tasks.texts import question_text

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import Task


def items_of(benchmark: Benchmark, tokenizer: Any, limit: int | float | None = None) -> list[Item]:
    """
    The test items of a benchmark as the harness scores them, task by task.

    Args:
        benchmark: of `load_task`.
        tokenizer: of the base model.
        limit: of each task, the first so many documents, or below 1 that share of them: the harness's `--limit`.
    """
    encoder, found = Encoder(tokenizer), []
    for name, task in benchmark.tasks.items():
        task.set_fewshot_seed(seed=benchmark.fewshot_seed)  # examples are drawn in the order of the documents
        for index, document in enumerate(_first(task.eval_docs, limit)):
            where = f"{name}/{test_split(task)}/{index}"
            found.append(_item(benchmark, task, encoder, Document(where, document)))
        task.set_fewshot_seed(seed=benchmark.fewshot_seed)
    return found


def references_of(
    benchmark: Benchmark, tokenizer: Any, split: str | None = None, limit: int | None = None
) -> list[Item]:
    """
    The references of a benchmark: questions with their answers, which are not tested.

    Those of a group's tasks take turns, so that the first ones are of all subjects; the order within a task depends on
    the text of the questions alone.

    Args:
        benchmark: of `load_task`.
        tokenizer: of the base model.
        split: of the data set, in place of those that `knnmoe_hf.tasks.splits` names.
        limit: as many at most, the first ones.

    Raises:
        ValueError: if the benchmark has no references.
    """
    return list(itertools.islice(iterate_references(benchmark, tokenizer, split), limit))


def iterate_references(benchmark: Benchmark, tokenizer: Any, split: str | None = None) -> Iterator[Item]:
    """As `references_of`, each made when it is asked for."""
    encoder = Encoder(tokenizer)
    by_task = []
    for task in benchmark.tasks.values():
        documents = sorted(reference_documents(task, split), key=_order)
        by_task.append(_made(benchmark, task, encoder, documents))
    return _in_turns(by_task)


def tested_prompts(benchmark: Benchmark) -> Iterator[Prompt]:
    """The questions of all test items, without their tokens."""
    for task in benchmark.tasks.values():
        for number, document in enumerate(task.eval_docs):
            yield prompt_of(task, number, document, ())


def prompt_of(task: "Task", number: int, document: Mapping[str, Any], tokens: Iterable[int]) -> Prompt:
    """
    The prompt of a test document whose tokens are known, as `items_of` has it.

    Args:
        task: of the harness.
        number: the document's place in the test split, `doc_id`.
        document: as the harness has it.
        tokens: ids of its context.
    """
    name = task.config.task
    return Prompt(f"{name}/{test_split(task)}/{number}", tuple(tokens), question_text(task, document), name)


def _made(benchmark: Benchmark, task: "Task", encoder: Encoder, documents: list[Document]) -> Iterator[Item]:
    task.set_fewshot_seed(seed=benchmark.fewshot_seed)
    for document in documents:
        with without_itself(task, document.content) as possible:
            if possible:
                yield _item(benchmark, task, encoder, document, answered=True)
    task.set_fewshot_seed(seed=benchmark.fewshot_seed)


def _item(benchmark: Benchmark, task: "Task", encoder: Encoder, document: Document, answered: bool = False) -> Item:
    """An item; `answered` for a reference, whose answer is what a model should say."""
    chat = encoder.apply_chat_template if benchmark.apply_chat_template else None
    settings = dict(apply_chat_template=bool(benchmark.apply_chat_template), chat_template=chat)
    context = task.fewshot_context(
        document.content,
        num_fewshot=task.config.num_fewshot or 0,
        system_instruction=benchmark.system_instruction,
        fewshot_as_multiturn=benchmark.fewshot_as_multiturn,
        gen_prefix=task.doc_to_prefix(document.content),
        **settings,
    )
    metadata = (task.config.task, 0, task.config.repeats)
    requests = task.construct_requests(doc=document.content, ctx=context, metadata=metadata, **settings)
    requests = requests if isinstance(requests, list) else [requests]
    if task.OUTPUT_TYPE == "generate_until":
        pairs, answer = [encoder.following(context, _answer(task, document, bool(chat), answered))], 0
    elif task.OUTPUT_TYPE == "loglikelihood_rolling":
        pairs, answer = [encoder.whole(requests[0].args[0])], 0
    else:
        pairs, answer = _choices(task, document, encoder, requests)
    prompt, choices = _split(pairs)
    text = question_text(task, document.content)
    return Item(Prompt(document.id, prompt, text, task.config.task), choices, answer)


def _choices(task: "Task", document: Document, encoder: Encoder, requests: "list[Instance]") -> tuple[list[Pair], int]:
    """Each choice as it is scored, and which is right (the first one, of several)."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return encoder.pairs(requests), 0
    choices = task.doc_to_choice(document.content)
    target = task.doc_to_text(document.content) if task.multiple_input else task.doc_to_target(document.content)
    target = target[0] if isinstance(target, list) else target
    answer = choices.index(target) if isinstance(target, str) else target
    return encoder.pairs(requests[: len(choices)]), answer  # further ones are choices without their context


def _answer(task: "Task", document: Document, chat: bool, answered: bool) -> str:
    """What follows the prompt of a generation."""
    content = document.content
    target = content[document.answer] if document.answer else task.doc_to_target(content)
    if answered and document.answer is None and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(content)[target] if isinstance(target, int) else target
    target = target[0] if isinstance(target, list) else str(target)
    return target if chat or document.answer else f"{task.config.target_delimiter}{target}"


def _split(pairs: list[Pair]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The prompt and what follows; of choices with different contexts, the prompt is what all have in common."""
    contexts = {context for context, _ in pairs}
    if len(contexts) == 1:
        return contexts.pop(), tuple(following for _, following in pairs)
    wholes = [context + following for context, following in pairs]
    shared = next(i for i, ids in enumerate(itertools.zip_longest(*wholes)) if len(set(ids)) > 1)
    return wholes[0][:shared], tuple(whole[shared:] for whole in wholes)


def _first(documents: Any, limit: int | float | None) -> Iterator[Any]:
    if limit is not None:
        limit = limit if limit >= 1 else -(-len(documents) * limit // 1)
    return itertools.islice(documents, None if limit is None else int(limit))


def _order(document: Document) -> bytes:
    return hashlib.sha256(repr(sorted(document.content.items(), key=lambda pair: pair[0])).encode()).digest()


def _in_turns(sources: list[Iterator[Item]]) -> Iterator[Item]:
    """One of each, again and again, as long as any has one."""
    for row in itertools.zip_longest(*sources):
        yield from (item for item in row if item is not None)
