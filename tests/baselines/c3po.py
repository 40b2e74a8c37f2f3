"""What the tests of C3PO share: questions, methods with known references, routes of a question's last token."""

import torch

from knnmoe_hf.baselines import make_method
from knnmoe_hf.baselines.neighborhoods import read_prompts
from knnmoe_hf.models.gates import find_gates
from tests.baselines.items import random_items, routes_of
from tests.support.models import tiny_model

FORMS = ("c3po_mode_finding", "c3po_kernel_regression", "c3po_gradient_descent", "c3po_released")
FOUR = {"olmoe": {"num_experts": 4}, "qwen3_moe": {"num_experts": 4}, "gpt_oss": {"num_local_experts": 4}}
QUESTION = random_items(seed=1)[0].prompt


def fitted(name: str, model, **options):
    method = make_method(name, **options)
    method.fit(model, random_items(count=16))
    return method


def with_references(name: str, model, pathways: list[torch.Tensor], **options):
    """A method whose references have these routing weights in both layers."""
    method, items = make_method(name, **options), random_items(count=len(pathways))
    embeddings, _ = read_prompts(model, [item.prompt.tokens for item in items])
    stacked = torch.stack([torch.stack([weights, weights]) for weights in pathways])
    method.restore(model, items, {"embeddings": embeddings, "pathways": stacked, "kept": torch.arange(len(items))})
    return method


def undecided(family: str):
    """A model with four experts whose gates give each of them a weight of 1/4."""
    model = tiny_model(family, **FOUR[family])
    for gate in find_gates(model):
        for parameter in gate.module.parameters():
            parameter.data.zero_()
    return model


def routed_to(method, model) -> list[torch.Tensor]:
    """By layer, the expert weights of the question's last token (E,) with the method."""
    with method.apply(model, QUESTION):
        return [routes[-1] for routes in routes_of(model, QUESTION.tokens).values()]


def by_convention(family: str, chosen: dict[int, float]) -> torch.Tensor:
    """Expert weights (4,) of a token whose two largest routing weights are these."""
    total = 1 if family == "olmoe" else sum(chosen.values())
    return torch.tensor([chosen.get(expert, 0.0) / total for expert in range(4)])
