"""The sequences that a forward's tokens belong to.

`Tokens` is what a route sees, on tensors alone. `call` reads it from a decoder's arguments; `cache` and `paged` keep
what goes on from one forward to the next.
"""

from knnmoe_hf.sequence.tokens import Series, State, Tokens

__all__ = ["Series", "State", "Tokens"]
