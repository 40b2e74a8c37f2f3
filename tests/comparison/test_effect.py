"""Whether a method has an effect, by what it answers; `test_broken.py` looks at those without one."""

from collections.abc import Sequence

import torch

from knnmoe_hf.comparison.effect import effect_on_responses
from knnmoe_hf.comparison.record import Entry, Record, Spent


def record(*responses, prompt_tokens: Sequence[float] = ()) -> Record:
    """Responses of items of two requests each, and how many tokens were put before their prompts."""
    found = Record()
    spent = [Spent(prompt_tokens=count) for count in prompt_tokens] or [Spent()] * len(responses)
    found.add(Entry(f"k{i}", f"task/{i // 2}", response, spent[i]) for i, response in enumerate(responses))
    return found


def test_an_item_has_changed_if_one_of_its_responses_has():
    items = {"task/0": ["k0", "k1"], "task/1": ["k2", "k3"]}
    frozen = record([-1.0, True], [-2.0, False], [-3.0, False], [-4.0, False])
    changed = record([-1.0, True], [-2.5, False], [-3.0, False], [-4.0, False])
    effect = effect_on_responses(frozen, changed, items, torch.float32)
    assert (effect.on, effect.items_checked, effect.items_changed, effect.is_none) == ("responses", 2, 1, False)
    assert effect_on_responses(frozen, frozen, items, torch.float32).is_none
