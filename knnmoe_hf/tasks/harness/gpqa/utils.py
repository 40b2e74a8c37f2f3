"""GPQA has one split: half of its questions are references, and the other half is tested."""

from datasets import Dataset
from lm_eval.tasks.gpqa.zeroshot.utils import process_docs

from knnmoe_hf.tasks.splits import is_reference


def tested(documents: Dataset) -> Dataset:
    """The questions that are not references, processed as the harness does."""
    return process_docs(documents.filter(lambda document: not is_reference(document["Question"])))


def references(documents: Dataset) -> Dataset:
    """The other questions."""
    return process_docs(documents.filter(lambda document: is_reference(document["Question"])))


tested.references = references
