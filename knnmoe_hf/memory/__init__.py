"""Routing memories: their rows, their folder, their way to and from the Hub."""

from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.memory.memory import RoutingMemory

__all__ = ["LayerRows", "RoutingMemory"]
