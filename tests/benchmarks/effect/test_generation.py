"""Continuations: what is counted in them, what is compared, and that each mode writes with its own memory."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import texts as module
from benchmarks.effect import generation
from benchmarks.effect.generation import change, continued, longest_repeat, measured, nll, repeated
from knnmoe_hf.lab import LAB_MODELS
from tests.support.models import tiny_model
from tests.support.tokenizers import byte_tokenizer


def test_repetition_is_counted():
    assert repeated([1, 2, 3, 4, 5, 6, 7]) == 0
    assert repeated([1] * 11) == 7 / 8  # eight 4-grams, one of them distinct
    assert longest_repeat([1, 2, 3, 4]) == 0 and longest_repeat([1, 1, 1, 1]) == 3
    assert longest_repeat([7, 1, 2, 3, 8, 1, 2, 3, 9]) == 3


def test_the_metrics_of_a_continuation():
    tokens = list(range(16))
    held = {tuple(range(8)), tuple(range(1, 9)), (9,) * 8}
    (row,) = measured(torch.tensor([tokens]), [1.25], held)
    assert dict(zip(generation.METRICS, row)) == {
        "repeated 4-grams, %": 0.0,
        "longest repeat, tokens": 0,
        "distinct 1-grams, %": 100.0,
        "distinct 2-grams, %": 100.0,
        "distinct 3-grams, %": 100.0,
        "copied 8-grams, %": pytest.approx(100 * 2 / 9, abs=1e-3),
        "NLL, nats per token": 1.25,
    }


def test_the_nll_is_of_the_continuation_alone():
    model = tiny_model("olmoe")
    prompts, following = torch.arange(12).view(2, 6), torch.arange(20, 28).view(2, 4)
    found, whole = nll(model, prompts, following), torch.cat([prompts, following], dim=1)
    with torch.no_grad():
        log_probs = model(whole).logits.log_softmax(-1)
    expected = [-sum(log_probs[i, 5 + j, following[i, j]].item() for j in range(4)) / 4 for i in range(2)]
    assert found == pytest.approx(expected, abs=1e-5)


def test_samples_hang_on_the_seed_and_greedy_text_on_nothing():
    model, prompts = tiny_model("olmoe"), torch.arange(12).view(2, 6)
    greedy, first, again, other = (continued(model, prompts, 8, seed) for seed in (None, 3, 3, 4))
    assert greedy.shape == (2, 8) and torch.equal(greedy, continued(model, prompts, 8, None))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_change_is_paired_by_prompt():
    base = torch.arange(20.0)
    found = change(base, base + 0.5)
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    shuffled = change(base, base.flip(0))
    assert shuffled.mean == pytest.approx(0) and shuffled.low < -1 < 1 < shuffled.high


def test_the_benchmark_writes_a_row_for_each_mode(tmp_path, monkeypatch):
    def documents(kind: str, split: str) -> list[str]:
        at = sum(map(ord, kind + split))
        return ["".join(chr(97 + (i * 3 + j * j + at) % 23) for j in range(300)) for i in range(20)]

    tiny_model("olmoe", vocab_size=260, max_position_embeddings=512).save_pretrained(tmp_path / "lab")
    byte_tokenizer().save_pretrained(tmp_path / "lab")
    monkeypatch.setitem(LAB_MODELS, "olmoe", tmp_path / "lab")
    monkeypatch.setattr(module, "documents", documents)
    wide_open = {"confidence": "rbf"}
    for mode, setting in generation.MODES.items():
        monkeypatch.setitem(generation.MODES, mode, replace(setting, config=setting.config | wide_open))
    sizes = "--labs olmoe --prompts 4 --prompt 8 --new 16 --seeds 0 1 --references 3".split()
    generation.main([*sizes, "--results", str(tmp_path)])
    (cell,) = json.loads((tmp_path / "generation.json").read_text())["cells"].values()
    assert list(cell) == ["in the domain", "off the domain"]
    for ways in cell.values():
        for modes in ways.values():
            assert list(modes) == ["frozen model", *generation.MODES, "the windows themselves"]
            assert all(len(rows) == 4 and len(rows[0]) == len(generation.METRICS) for rows in modes.values())
    sampled = cell["in the domain"]["sampled"]
    assert len({json.dumps(sampled[mode]) for mode in ("frozen model", *generation.MODES)}) == 4
    page = (tmp_path / "generation.md").read_text()
    assert page.count("## lab OLMoE, topics: ") == 4 and page.count("| memory: both |") == 4
    assert str(tmp_path) not in page.replace(f"--results {tmp_path}", "")
