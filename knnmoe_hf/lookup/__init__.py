"""A token's way through one layer's memory: tensors only, neither models nor hooks."""
