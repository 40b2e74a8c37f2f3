"""Worked examples in the prompt of a reference, of which the reference itself must not be one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.api.task import Task


class _Without:
    """A sampler of examples that leaves one document out."""

    def __init__(self, sampler: Any, document: Mapping[str, Any]):
        self._sampler, self._document = sampler, document

    def sample(self, n: int, eval_doc: Any = None, **more: Any) -> Any:
        """As the harness's samplers."""
        return self._sampler.sample(n, eval_doc=self._document, **more)


@contextmanager
def without_itself(task: "Task", document: Mapping[str, Any]) -> Iterator[bool]:
    """
    Inside this context the worked examples of a prompt are others than the document itself.

    Args:
        task: of the harness.
        document: a reference.

    Yields:
        Whether there are enough others; MMLU's five examples are its whole split `dev`, so that with five in each
        prompt these five cannot be references.
    """
    wanted, sampler = task.config.num_fewshot or 0, getattr(task, "sampler", None)
    if not wanted or sampler is None:
        yield True
        return
    plain = {name: value for name, value in document.items() if name != "is_fewshot"}
    pool = sampler.fewshot_docs()
    if len(pool) <= wanted and plain in list(pool):
        yield False
        return
    if len(pool) <= wanted:  # given examples, all of which are in each prompt
        yield True
        return
    task.sampler = _Without(sampler, plain)
    try:
        yield True
    finally:
        task.sampler = sampler
