"""Routing memories: their rows, their folder, their way to and from the Hub."""

from knnmoe_hf.memory.memory import RoutingMemory
from knnmoe_hf.memory.rows import LayerRows

__all__ = ["LayerRows", "RoutingMemory"]
