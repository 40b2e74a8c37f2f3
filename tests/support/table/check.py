"""What a cell of the table claims, as a check that also runs in other processes."""

from functools import partial

import torch

from knnmoe_hf import attach_memory, disable_memory, set_memory
from tests.support.caches import uncached
from tests.support.families import family_model
from tests.support.models import random_memory
from tests.support.stats import with_fit

TOKENS = torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(2))  # special tokens are above

MEMORIES = {
    "routing": partial(random_memory, confidence="rbf"),
    # carries a state, and changes logits as well
    "both": lambda model, **options: with_fit(random_memory(model, recall="both", confidence="calibrated", **options)),
}
"""The memories that ways are tried with."""

# of families whose tokens are so unlike the random rows of the memories that the second one would not open
THRESHOLDS = {"dots1": 0.3}


class WithoutMemory(Exception):
    """The model cannot be run this way without a memory either."""


def check(family, way, folder) -> None:
    """
    With a memory a model gives what plain passes with it give; with the memory off, to the bit what it gave before.

    Raises:
        WithoutMemory: if the model, without a memory, cannot be run this way or differs from plain passes.
        AssertionError: if the memory changes anything else.
    """
    plain = way.plain(family_model(family))
    opened = {"context_threshold": THRESHOLDS[family]} if family in THRESHOLDS else {}
    memories = {name: MEMORIES[name](plain, **opened) for name in way.memories}
    base = uncached(plain, TOKENS)
    untouched, limit = _without_memory(way, family, plain, folder / "without")
    model = way.before(family_model(family), _made(folder / "with"))
    for name, memory in memories.items():
        attach_memory(plain, memory, name)
        attach_memory(model, memory, name)
    model = way.after(model, folder / "with")
    for name in memories:
        set_memory(plain, name)
        set_memory(model, name)
        _, difference = _run(way, model, plain)
        assert difference <= limit, f"with {name}, differs by {difference:.2g} from plain passes with it"
        assert (uncached(plain, TOKENS) - base).abs().max() > 1e-3, f"the memory with {name} changes nothing"
    with disable_memory(model), disable_memory(plain):
        found, _ = _run(way, model, plain)
    assert len(found) == len(untouched)
    assert all(torch.equal(one, other) for one, other in zip(found, untouched)), "differs with the memory off"


def _without_memory(way, family, plain, folder) -> tuple[list[torch.Tensor], float]:
    """What the way gives on a model that has no memory, and by how much it may differ from plain passes with one."""
    try:
        model = way.after(way.before(family_model(family), _made(folder)), folder)
        found, difference = _run(way, model, plain)
    except Exception as error:
        raise WithoutMemory(f"{type(error).__name__}: {error}") from error
    if not difference <= (0.5 if way.half else 0.02):
        raise WithoutMemory(f"differs by {difference:.2g} from plain passes")
    return found, max(3 * difference, 2e-3 if way.half else 2e-4)


def _run(way, model, plain) -> tuple[list[torch.Tensor], float]:
    """What the way gives, and how much it differs from plain passes: at most, or in the median in half precision."""
    pairs = list(way.run(model, plain, TOKENS))
    differences = torch.cat([(one.float() - other.float()).abs().flatten().detach() for one, other in pairs])
    return [found.detach() for found, _ in pairs], float(differences.median() if way.half else differences.max())


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder
