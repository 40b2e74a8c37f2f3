"""
Benchmarks as questions with choices: their items as token ids, and reference sets made from their splits.

Tasks are those of lm-evaluation-harness, and ours in `harness/`; the harness is imported when a task is loaded.
"""

from knnmoe_hf.tasks.items import Item, Prompt, rows_of
from knnmoe_hf.tasks.loading import Benchmark, load_task, task_manager
from knnmoe_hf.tasks.overlap import OverlapReport, without_test_items
from knnmoe_hf.tasks.reading import items_of, prompt_of, references_of

__all__ = [
    "Benchmark",
    "Item",
    "OverlapReport",
    "Prompt",
    "items_of",
    "load_task",
    "prompt_of",
    "references_of",
    "rows_of",
    "task_manager",
    "without_test_items",
]
