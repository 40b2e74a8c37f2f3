"""Whether a method has an effect, by what it answers; `test_run.py` looks at routes."""

from knnmoe_hf.comparison.effect import effect_on_responses
from knnmoe_hf.comparison.record import Entry, Record, Spent


def record(*responses) -> Record:
    found = Record()
    found.add(Entry(f"k{i}", f"task/{i // 2}", response, Spent()) for i, response in enumerate(responses))
    return found


def test_an_item_has_changed_if_one_of_its_responses_has():
    items = {"task/0": ["k0", "k1"], "task/1": ["k2", "k3"]}
    frozen = record([-1.0, True], [-2.0, False], [-3.0, False], [-4.0, False])
    effect = effect_on_responses(frozen, record([-1.0, True], [-2.5, False], [-3.0, False], [-4.0, False]), items)
    assert (effect.on, effect.items_checked, effect.items_changed, effect.is_none) == ("responses", 2, 1, False)
    assert effect_on_responses(frozen, frozen, items).is_none
