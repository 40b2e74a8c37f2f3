"""Whether a method does anything: a method that changed nothing is broken, and its change of 0 is not a result."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lm_eval.api.instance import Instance

from knnmoe_hf.baselines.base import Method
from knnmoe_hf.comparison.model import MethodLM, item_key
from knnmoe_hf.comparison.record import Record
from knnmoe_hf.evaluation.routing import RoutingRecord, record_routing

SAMPLE = 4
"""Items whose routes are compared; all of them, if none of these has changed."""


@dataclass(frozen=True)
class Effect:
    """
    What a method changed against the frozen model.

    Attributes:
        on: what was looked at: `"routing"`, `"prompts"` or `"responses"`.
        items_checked, items_changed: of the task that it was fitted for.
        tokens: whose routes were compared; None if they were not.
        share: of the pairs of such a token and a layer, those whose set of experts is another one; None likewise.
    """

    on: str
    items_checked: int
    items_changed: int
    tokens: int | None = None
    share: float | None = None

    @property
    def is_none(self) -> bool:
        """Whether nothing changed on any item."""
        return not self.items_changed


def effect_on_routing(model, tokenizer, method: Method, requests: Sequence[Instance], prompt_of) -> Effect:
    """
    Compares the expert ids and weights that the blocks get with the frozen model's.

    Args:
        model, tokenizer, method, prompt_of: as `MethodLM` takes them; the method is fitted.
        requests: of all items.
    """
    items = list(dict.fromkeys(item_key(request) for request in requests))
    step = max(1, len(items) // SAMPLE)
    sample = set(items[::step][:SAMPLE])
    effect = _compared(model, tokenizer, method, [r for r in requests if item_key(r) in sample], prompt_of)
    if not effect.is_none or len(sample) == len(items):
        return effect
    return _compared(model, tokenizer, method, requests, prompt_of)


def effect_on_prompts(record: Record, requests_of: dict[str, list[str]]) -> Effect:
    """
    Counts the items whose prompt got other tokens before it.

    Their responses say less: an unchanged prompt is answered alone and not in a batch, which rounds otherwise.

    Args:
        record: with all responses.
        requests_of: the keys of each item's requests.
    """
    differ = [any(record[key].spent.prompt_tokens for key in keys) for keys in requests_of.values()]
    return Effect("prompts", len(differ), sum(differ))


def effect_on_responses(
    frozen: Record, changed: Record, requests_of: dict[str, list[str]], dtype: torch.dtype
) -> Effect:
    """
    Compares recorded responses.

    Args:
        frozen, changed: with all of them.
        requests_of: the keys of each item's requests.
        dtype: of the model.
    """
    differ = [
        any(_differ(frozen[key].response, changed[key].response, dtype) for key in keys)
        for keys in requests_of.values()
    ]
    return Effect("responses", len(differ), sum(differ))


def rounding(dtype: torch.dtype) -> float:
    """
    Differences up to this one, relative where a value is above 1, may come from rounding alone.

    A bias that is the same for all experts routes every token as before, and its weights differ in their last digits.
    """
    return max(1e-5, 4 * torch.finfo(dtype).eps)


def _differ(before, after, dtype: torch.dtype) -> bool:
    """Whether two responses differ by more than rounding: texts, log-likelihoods, or lists that begin with one."""
    if isinstance(before, str):
        return before != after
    before, after = (one[0] if isinstance(one, list) else one for one in (before, after))
    return not abs(after - before) <= rounding(dtype) * max(1.0, abs(before))


def _compared(model, tokenizer, method: Method, requests: Sequence[Instance], prompt_of) -> Effect:
    frozen, changed = (_routes(model, tokenizer, one, requests, prompt_of) for one in (None, method))
    found = [_change(*pair, model.dtype) for pair in zip(frozen, changed, strict=True)]
    tokens = sum(record.tokens for record in frozen)
    share = sum(part * record.tokens for (_, part), record in zip(found, frozen)) / tokens
    items = len({item_key(request) for request in requests})
    return Effect("routing", items, min(items, sum(differs for differs, _ in found)), tokens, share)


def _routes(model, tokenizer, method: Method | None, requests: Sequence[Instance], prompt_of) -> list[RoutingRecord]:
    """What the blocks used in each call, one sequence each, so that there is no padding."""
    records: list[RoutingRecord] = []

    @contextmanager
    def recorded() -> Iterator[None]:
        with record_routing(model) as record:
            yield
        records.append(record)

    lm = MethodLM(model, tokenizer, method, prompt_of, batch_size=1, one_by_one=True)
    lm.around = recorded
    by_type: dict[str, list[Instance]] = {}
    for request in requests:
        by_type.setdefault(request.request_type, []).append(request)
    for kind, some in by_type.items():
        getattr(lm, kind)(some)
    return records


def _change(frozen: RoutingRecord, changed: RoutingRecord, dtype: torch.dtype) -> tuple[bool, float]:
    """Whether anything differs by more than rounding, and the share of tokens and layers with other experts."""
    if frozen.tokens != changed.tokens:  # another text was generated
        return True, 1.0
    change = frozen.change_to(changed)
    return not change.largest <= rounding(dtype), change.mean_changed
