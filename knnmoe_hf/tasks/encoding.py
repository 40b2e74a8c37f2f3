"""Requests of a task as token ids, made by the harness's own `HFLM`, of which only the tokenizer is there."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of a context and of what follows it."""


@functools.cache
def _class() -> type:
    """`HFLM` without a model: it encodes as in an evaluation, and returns what it would score."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.huggingface import HFLM

    class TokenizerOnly(HFLM):
        backend = "causal"

        def __init__(self, tokenizer: Any):
            TemplateLM.__init__(self)
            self.tokenizer, self.add_bos_token, self.custom_prefix_token_id = tokenizer, None, None
            self.chat_template_args, self.enable_thinking = {}, None

        def _loglikelihood_tokens(self, requests, **_):
            return [(tuple(context), tuple(continuation)) for _, context, continuation in requests]

    return TokenizerOnly


class Encoder:
    """
    Text as an evaluation encodes it.

    Args:
        tokenizer: of the base model.
    """

    def __init__(self, tokenizer: Any):
        self._lm = _class()(tokenizer)
        self.apply_chat_template = self._lm.apply_chat_template

    def pairs(self, requests: "Sequence[Instance]") -> list[Pair]:
        """What is scored of requests for log-likelihoods, in their order."""
        return self._lm.loglikelihood(list(requests), disable_tqdm=True)

    def prompt(self, context: str) -> tuple[int, ...]:
        """The prompt of a generation."""
        return tuple(self._lm.tok_encode(context))

    def following(self, context: str, text: str) -> Pair:
        """The prompt of a generation and a text that follows it, of which no token reaches into the prompt."""
        prompt, whole = self.prompt(context), self.prompt(context + text)
        if whole[: len(prompt)] == prompt:
            return prompt, whole[len(prompt) :]
        return prompt, tuple(self._lm.tok_encode(text, add_special_tokens=False))

    def whole(self, text: str) -> Pair:
        """A text without context, after the token that begins every text."""
        return (self._lm.prefix_token_id,), tuple(self._lm.tok_encode(text, add_special_tokens=False))
