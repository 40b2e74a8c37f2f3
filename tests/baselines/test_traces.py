"""A fit leaves nothing behind that a later method, or a run that loads it, would answer otherwise by."""

import random

import numpy as np
import pytest
import torch

from knnmoe_hf.baselines import METHODS, make_method
from tests.baselines.items import random_items
from tests.baselines.test_contract import OPTIONS, model_for
from tests.support.tokenizers import byte_tokenizer

QUICK = {"build": {"builder_steps": 1}}
SLOW = ("steermoe", "knn_moe_both", "knn_lm")  # which read this machine's text for seconds


def traces(model) -> list:
    """What of a model and of this process is no weight."""
    numbers = np.random.get_state()
    return [
        model.config.to_dict(),
        model.generation_config.to_dict(),
        [(name, module.training, type(module)) for name, module in model.named_modules()],
        [(name, one.requires_grad, one.grad is None) for name, one in model.named_parameters()],
        [[*module._forward_hooks.values(), *module._forward_pre_hooks.values()] for module in model.modules()],
        torch.random.get_rng_state().tolist(),
        (numbers[1].tolist(), numbers[2]),
        random.getstate(),
    ]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in METHODS])
def test_a_fit_changes_neither_configurations_nor_random_numbers(name):
    model = model_for("olmoe")
    model.generation_config.eos_token_id = [7, 9]  # of a model that the tokenizer does not know
    method = make_method(name, **OPTIONS.get(name, QUICK if name.startswith("knn") else {}))
    before = traces(model)
    method.fit(model, random_items(20), seed=1, tokenizer=byte_tokenizer())
    for was, found in zip(before, traces(model), strict=True):
        assert found == was
