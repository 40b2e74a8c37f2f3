"""Builders: the methods that optimise the routing logits of reference tokens."""
