"""Other ways to adapt a model by the same references, behind one interface; kNN-MoE itself is among them."""

from knnmoe_hf.baselines.base import Cost, Method
from knnmoe_hf.baselines.registry import METHODS, make_method

__all__ = ["METHODS", "Cost", "Method", "make_method"]
