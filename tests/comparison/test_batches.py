"""Every method answers each item as it would alone, in any batch size and order of the items."""

import pytest
import torch

from knnmoe_hf.baselines import METHODS, make_method
from knnmoe_hf.baselines.base import Method
from knnmoe_hf.comparison.model import MethodLM
from tests.baselines.items import random_items
from tests.comparison.helpers import requests_of, write_task
from tests.support.models import tiny_model
from tests.support.tokenizers import byte_tokenizer

MEMORY = {"build": {"builder_steps": 1}}  # without a tokenizer: its confidence follows the context
OPTIONS = {
    "knn_moe": MEMORY,
    "knn_moe_both": MEMORY,
    "knn_lm": MEMORY,
    "constant_bias": {"learning_rates": [0.3], "epochs": 1},
    "dsmoe": {"num_experts": 6, "strength": 3.0},
    "steermoe": {"share_on": 0.15, "share_off": 0.3},
    "laser": {"confident": 9.0, "threshold": 0.0},
    "in_context_fixed": {"examples": 2},
    "in_context_retrieved": {"examples": 2},
    "c3po_gradient_descent": {"steps": 2},
    "c3po_kernel_regression": {"shares": 3},
    "rewiring": {"steps": 2},
    "router_only": {"learning_rates": [0.03], "epochs": 1},
    "roma": {"learning_rates": [0.03], "lambdas": [1.0], "epochs": 1},
    "lora": {"learning_rates": [0.03], "epochs": 1},
    "full_fine_tuning": {"learning_rates": [0.01], "epochs": 1},
}
FAMILY = {name: ("olmoe", "qwen3_moe", "gpt_oss")[number % 3] for number, name in enumerate(METHODS)}
"""One of the three rules for each method, each form of a method another one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, 7)
    write_task(folder, 7, kind="generate_until", name="writing")
    return folder


QUICK = ("frozen", "knn_moe", "constant_bias", "in_context_retrieved", "c3po_released", "router_only", "lora")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in METHODS])
def test_an_answer_does_not_depend_on_the_batch_or_the_order(name, folder):
    model, tokenizer = tiny_model(FAMILY[name], vocab_size=260, max_position_embeddings=256), byte_tokenizer()
    # else the harness ends a text at the end-of-text token only where all texts of the batch have ended
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    method = make_method(name, **OPTIONS.get(name, {}))
    method.fit(model, random_items(20), tokenizer=None if name.startswith("knn") else tokenizer)
    requests, writing = requests_of(folder), requests_of(folder, "writing")

    def answered(batch_size: int, chosen: Method | None = method, turned: bool = False) -> tuple:
        lm = MethodLM(model, tokenizer, chosen, batch_size=batch_size)
        step = -1 if turned else 1
        scores = [score for score, _ in lm.loglikelihood(requests[::step])][::step]
        return torch.tensor(scores), lm.generate_until(writing[::step])[::step]

    alone, texts = answered(1)
    for batch_size, turned in ((3, False), (7, True)):
        scores, others = answered(batch_size, turned=turned)
        torch.testing.assert_close(scores, alone, atol=1e-4, rtol=1e-5)
        assert others == texts
    assert name == "frozen" or (alone - answered(1, None)[0]).abs().max() > 1e-3
