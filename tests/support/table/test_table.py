"""Every cell of the support table: with a memory, each way of running gives what plain passes with the memory give.

And with the memory off, it gives to the bit what the way gives on a model that never had one.
"""

import logging

import pytest
import torch

from knnmoe_hf import attach_memory, disable_memory, set_memory
from tests.support.caches import uncached
from tests.support.families import family_model
from tests.support.models import random_memory
from tests.support.table.cells import CELLS, MAIN
from tests.support.table.ways import WAYS


class WithoutMemory(Exception):
    """The model cannot be run this way without a memory either."""


def parameters():
    for (family, way), reason in CELLS.items():
        marks = []
        if reason is not None:
            marks.append(pytest.mark.xfail(reason=reason, raises=WithoutMemory, strict=True))
        if family not in MAIN and not WAYS[way].quick:
            marks.append(pytest.mark.slow)
        yield pytest.param(family, WAYS[way], marks=marks, id=f"{family}, {way}")


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest would collect it, slowly
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family, way", parameters())
def test_a_model_with_a_memory_gives_what_plain_passes_give(family, way, tokens, tmp_path):
    tokens = tokens.clamp(1, 90)  # special tokens of those with vision towers are above
    plain = way.plain(family_model(family))
    memories = {confidence: random_memory(plain, confidence=confidence) for confidence in way.confidences}
    base = uncached(plain, tokens)
    untouched, limit = without_memory(way, family, plain, tokens, tmp_path / "without")
    model = way.before(family_model(family), made(tmp_path / "with"))
    for name, memory in memories.items():
        attach_memory(plain, memory, name)
        attach_memory(model, memory, name)
    model = way.after(model, tmp_path / "with")
    for name in memories:
        set_memory(plain, name)
        set_memory(model, name)
        _, difference = run(way, model, plain, tokens)
        assert difference <= limit, name
        assert (uncached(plain, tokens) - base).abs().max() > 0.05  # the memory matters
    with disable_memory(model), disable_memory(plain):
        found, _ = run(way, model, plain, tokens)
    assert len(found) == len(untouched)
    assert all(torch.equal(one, other) for one, other in zip(found, untouched))


def without_memory(way, family, plain, tokens, folder):
    """What the way gives on a model that has no memory, and by how much it may differ from plain passes with one."""
    try:
        model = way.after(way.before(family_model(family), made(folder)), folder)
        found, difference = run(way, model, plain, tokens)
    except Exception as error:
        raise WithoutMemory(f"{type(error).__name__}: {error}") from error
    if not difference <= (0.5 if way.half else 0.02):
        raise WithoutMemory(f"differs by {difference:.2g} from plain passes")
    return found, max(3 * difference, 2e-3 if way.half else 2e-4)


def run(way, model, plain, tokens) -> tuple[list[torch.Tensor], float]:
    """What the way gives, and how much it differs from plain passes: at most, or in the median in half precision."""
    pairs = list(way.run(model, plain, tokens))
    differences = torch.cat([(one.float() - other.float()).abs().flatten().detach() for one, other in pairs])
    return [found.detach() for found, _ in pairs], float(differences.median() if way.half else differences.max())


def made(folder):
    folder.mkdir()
    return folder
