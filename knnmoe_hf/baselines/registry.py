"""The methods by name; a method's module is imported when it is made."""

import importlib
from dataclasses import fields

from knnmoe_hf.baselines.base import Method
from knnmoe_hf.errors import shown

METHODS: dict[str, str] = {
    "frozen": "frozen:Frozen",
    "knn_moe": "memories:KNNMoE",
    "knn_moe_both": "memories:KNNMoEBoth",
    "knn_lm": "memories:KNNLM",
    "constant_bias": "constant_bias:ConstantBias",
    "dsmoe": "dsmoe:DSMoE",
    "steermoe": "steermoe:SteerMoE",
    "laser": "laser:Laser",
    "in_context_fixed": "in_context:InContextFixed",
    "in_context_retrieved": "in_context:InContextRetrieved",
    "c3po_mode_finding": "c3po:ModeFinding",
    "c3po_kernel_regression": "c3po:KernelRegression",
    "c3po_gradient_descent": "c3po:GradientDescent",
    "c3po_released": "c3po:Released",
    "rewiring": "rewiring:Rewiring",
    "router_only": "roma:RouterOnly",
    "roma": "roma:RoMA",
    "lora": "fine_tuning:LoRA",
    "full_fine_tuning": "fine_tuning:FullFineTuning",
}
"""`{name: "module:class"}`; modules of this package."""


def method_class(name: str) -> type[Method]:
    """
    The class of a method.

    Raises:
        ValueError: for a name that is not in `METHODS`.
    """
    if name not in METHODS:
        raise ValueError(f"method={shown(name)} is not known: choose among {', '.join(METHODS)}.")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(f"knnmoe_hf.baselines.{module}"), attribute)


def make_method(name: str, **options) -> Method:
    """
    A method with its defaults, or with other options.

    Args:
        name: one of `METHODS`.
        options: fields of the method's class.

    Raises:
        ValueError: for an unknown name or option.
    """
    kind = method_class(name)
    allowed = [field.name for field in fields(kind)]
    if unknown := sorted(set(options) - set(allowed)):
        choices = f"choose among {', '.join(allowed)}" if allowed else "it has none"
        raise ValueError(f"{shown(unknown[0])} is not an option of the method {name}: {choices}.")
    return kind(**options)
