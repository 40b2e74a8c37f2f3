"""Routing memories: their rows, their folder, their way to and from the Hub."""

from knnmoe_hf.memory.memory import LayerRows, RoutingMemory

__all__ = ["LayerRows", "RoutingMemory"]
