"""Builders: how the logits of reference tokens are optimised."""
