"""`use_memory` and `disable_memory`: how a context ends, and what is in force inside."""

import asyncio
import contextvars
import copy
import gc
from contextlib import ExitStack, contextmanager

import pytest
import torch

from knnmoe_hf import active_memory, attach_memory, detach_memory, disable_memory, get_memory, set_memory, use_memory
from knnmoe_hf.models.hooks import RoutingHooks
from tests.models.callers import alone, in_thread, logits_of
from tests.support.attaching import hooks_of
from tests.support.models import random_memory, tiny_model


def test_set_memory_in_a_context_changes_nothing_elsewhere(shared):
    with use_memory(shared, "medicine"):
        set_memory(shared, "music")
        assert active_memory(shared) == "music" and in_thread(active_memory, shared) == "law"
        with disable_memory(shared):
            assert active_memory(shared) is None and in_thread(active_memory, shared) == "law"
            assert get_memory(shared) is get_memory(shared, "music")
            set_memory(shared, "law")
            assert active_memory(shared) is None
        assert active_memory(shared) == "law"
        set_memory(shared, "music")
        with use_memory(shared, "medicine"):
            set_memory(shared, "law")
        assert active_memory(shared) == "music"
    assert active_memory(shared) == "law"


def test_set_memory_inside_disable_memory_says_that_it_has_no_effect(shared, tokens, caplog):
    base = alone(shared, lambda model: logits_of(model, tokens))[None]
    with disable_memory(shared):
        set_memory(shared, "music")
        assert torch.equal(logits_of(shared, tokens), base) and in_thread(active_memory, shared) == "law"
        assert "'music' is not put in force, neither inside disable_memory(model) nor after it" in caplog.text
        with use_memory(shared, "music"):
            assert not torch.equal(logits_of(shared, tokens), base)
    assert active_memory(shared) == "law"


def test_unknown_names_are_errors_and_none_is_no_memory(shared):
    with pytest.raises(ValueError, match="no memory named 'poems' is attached"), use_memory(shared, "poems"):
        pass
    with pytest.raises(ValueError, match="no memory is attached to this"), use_memory(tiny_model("olmoe"), "law"):
        pass
    with use_memory(shared, None):
        assert active_memory(shared) is None
    assert active_memory(shared) == "law"


async def held_open(model, name):
    with use_memory(model, name):
        while True:
            yield active_memory(model)


@pytest.mark.parametrize("closed", ["by a task that inherited it", "by the garbage collector", "in a thread"])
def test_a_context_that_an_asynchronous_generator_holds_open_ends_with_it(shared, closed):
    async def run():
        streaming = held_open(shared, "music")
        async for name in streaming:
            assert name == active_memory(shared) == "music"
            break
        if closed == "in a thread":
            await asyncio.to_thread(asyncio.run, close(streaming))
        elif closed == "by a task that inherited it":
            await asyncio.create_task(close(streaming))
        del streaming
        gc.collect()
        for _ in range(5):
            await asyncio.sleep(0)
        return active_memory(shared), logits_of(shared, torch.arange(6)[None])

    async def close(streaming):
        await streaming.aclose()

    name, found = asyncio.run(run())
    assert name == "law" and torch.equal(found, logits_of(shared, torch.arange(6)[None]))
    assert RoutingHooks.of(shared).users == 0


def test_a_context_that_is_ended_inside_a_copy_of_the_context_variables_ends(shared):
    context = use_memory(shared, "music")
    context.__enter__()
    contextvars.copy_context().run(context.__exit__, None, None, None)
    assert active_memory(shared) == "law"


def test_a_context_that_a_generator_holds_open_ends_with_it_wherever_that_is(shared):
    def held(name):
        with use_memory(shared, name):
            while True:
                yield active_memory(shared)

    first, second = held("medicine"), held("music")
    assert next(first) == "medicine" and next(second) == "music" and next(first) == "music"  # the innermost decides
    first.close()
    assert active_memory(shared) == "music" and in_thread(active_memory, shared) == "law"
    in_thread(second.close)  # as a server does, or the garbage collector
    assert active_memory(shared) == "law"
    third = held("medicine")
    assert next(third) == "medicine"
    del third
    gc.collect()
    assert active_memory(shared) == "law" and RoutingHooks.of(shared).users == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_contexts_may_end_in_any_order(shared, order):
    contexts = [use_memory(shared, "medicine"), disable_memory(shared), use_memory(shared, "music")]
    inside = ["medicine", None, "music"]
    for context in contexts:
        context.__enter__()
    left = [0, 1, 2]
    for ended in order:
        assert active_memory(shared) == inside[left[-1]]
        contexts[ended].__exit__(None, None, None)
        left.remove(ended)
    assert active_memory(shared) == "law"


def test_contexts_end_with_exceptions(shared):
    with pytest.raises(KeyError), use_memory(shared, "music"):
        with pytest.raises(OSError), use_memory(shared, "medicine"):
            raise OSError
        assert active_memory(shared) == "music"
        raise KeyError
    assert active_memory(shared) == "law" and RoutingHooks.of(shared).users == 0


def test_a_copy_is_outside_of_the_contexts_of_its_original(shared, tokens):
    expected = alone(shared, lambda model: logits_of(model, tokens))
    with use_memory(shared, "music"):
        twin = copy.deepcopy(shared)
        assert active_memory(twin) == "law" and torch.equal(logits_of(twin, tokens), expected["law"])
        with use_memory(twin, "medicine"):
            assert active_memory(shared) == "music" and torch.equal(logits_of(twin, tokens), expected["medicine"])
        set_memory(twin, "medicine")
        assert active_memory(shared) == "music"
    assert active_memory(shared) == "law" and active_memory(twin) == "medicine"
    with use_memory(twin, "music"):
        detach_memory(twin)
    assert not hooks_of(twin) and hooks_of(shared)


def test_a_context_goes_on_with_what_another_thread_detaches(shared, tokens):
    expected = alone(shared, lambda model: logits_of(model, tokens))
    with use_memory(shared, "music"):
        in_thread(detach_memory, shared)
        assert active_memory(shared) == "music" and torch.equal(logits_of(shared, tokens), expected["music"])
        assert in_thread(active_memory, shared) is None
    assert not hooks_of(shared) and torch.equal(logits_of(shared, tokens), expected[None])


def test_what_is_detached_inside_a_context_is_out_of_force_there(shared, tokens):
    expected = alone(shared, lambda model: logits_of(model, tokens))
    with use_memory(shared, "music"):
        detach_memory(shared, "music")
        assert active_memory(shared) is None and torch.equal(logits_of(shared, tokens), expected[None])
    assert active_memory(shared) == "law"


def test_what_is_attached_inside_a_context_is_in_force_there_alone(shared):
    with use_memory(shared, "music"):
        attach_memory(shared, random_memory(shared, seed=9), "new")
        assert active_memory(shared) == "new" and in_thread(active_memory, shared) == "law"
    assert active_memory(shared) == "law"


@contextmanager
def opened(*contexts):
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def test_contexts_on_several_models_are_independent(shared):
    twin = copy.deepcopy(shared)
    with opened(use_memory(shared, "music"), use_memory(twin, "medicine"), disable_memory(shared)):
        assert active_memory(shared) is None and active_memory(twin) == "medicine"
    assert active_memory(shared) == active_memory(twin) == "law"
