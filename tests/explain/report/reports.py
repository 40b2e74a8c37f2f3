"""Reports on a memory of the lab model whose references are difficult text, with the text that it was run on."""

from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knnmoe_hf import attach_memory
from knnmoe_hf.explain.report.page import Report
from knnmoe_hf.explain.report.use import measure_use
from knnmoe_hf.lab import LAB_MODELS
from knnmoe_hf.memory.manifest import CalibrationRecord
from knnmoe_hf.memory.sweep import SweepPoint
from tests.explain.pages import with_text
from tests.support.domain import row
from tests.support.models import random_memory
from tests.support.stats import with_stats

OTHER = "import os\nfor name in os.listdir('.'):\n    print(name)\n"
SWEEP = [SweepPoint(0.1 * step, 0.1 - 0.01 * step, 0.03 - 0.003 * step) for step in range(10)]


def windows(tokenizer, text: str, count: int) -> list[dict]:
    ids = tokenizer(text * 9).input_ids[:40]
    rows = [ids[start:] + ids[:start] for start in range(count)]
    return [row(ids, example) for example, ids in enumerate(rows)]


def lab_report(is_calibrated: bool = True, **options) -> Report:
    """A report with text of the domain and other text."""
    torch.manual_seed(0)
    name = str(LAB_MODELS["olmoe"])
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    memory = with_text(random_memory(model, rows=60, **options), tokenizer)
    if is_calibrated:
        memory.config.confidence = "calibrated"
        record = CalibrationRecord(SWEEP[4].threshold, 0.06, 0.1, {}, [], {}, sweep=SWEEP)
        memory = replace(with_stats(memory, threshold=0.3), calibration=record)
    attach_memory(model, memory)
    texts = [
        ("the <b>domain</b>", True, windows(tokenizer, "The gate routes each token to experts. ", 6)),
        ("other text", False, windows(tokenizer, OTHER, 6)),
    ]
    return Report(memory, "my memory", measure_use(model, texts, batch_size=4))
