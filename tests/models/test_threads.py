"""Many callers of one model: each thread and each asyncio task gets what it would get alone."""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from knnmoe_hf import (
    active_memory,
    attach_memory,
    attach_override,
    detach_memory,
    disable_memory,
    set_memory,
    use_memory,
    watch_lookups,
)
from tests.models.callers import NAMES, alone, assert_same, generated, in_context, in_thread, logits_of
from tests.support.attaching import hooks_of
from tests.support.models import random_memory, tiny_model
from tests.support.training import build, trainer_for

# threads


def test_threads_with_different_masks_do_not_interfere():
    model = tiny_model("olmoe")
    attach_memory(model, random_memory(model))
    generator = torch.Generator().manual_seed(5)
    calls = []
    for length in (6, 15, 15, 11):
        ids = torch.randint(96, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : length // 2] = 0
        calls.append((ids, mask if length != 11 else None))

    def run(call):
        ids, mask = call
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits

    expected = [run(call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, calls * 60))
    for i, logits in enumerate(found):
        assert_same(logits, expected[i % 4])


def test_threads_with_different_memories_get_what_each_gets_alone(shared, tokens):
    expected = alone(shared, lambda model: logits_of(model, tokens))
    assert all(not torch.equal(expected["law"], expected[name]) for name in expected if name != "law")

    def run(name):
        with in_context(shared, name):
            assert active_memory(shared) == name
            return logits_of(shared, tokens)

    names = [*NAMES, None] * 30
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, names))
    for name, logits in zip(names, found):
        assert_same(logits, expected[name])


WAYS = {
    "greedy": dict(do_sample=False),
    "beams": dict(do_sample=False, num_beams=3),
    "sampled": dict(do_sample=True, top_k=0),
    "without a cache": dict(do_sample=False, use_cache=False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("confidence", ["rbf", "context"])
def test_generations_in_threads_are_those_of_each_alone(tokens, way, confidence):
    model = tiny_model("olmoe")
    for seed, name in enumerate(NAMES):
        attach_memory(model, random_memory(model, seed=seed + 1, confidence=confidence), name)

    def generate(model):
        options = dict(max_new_tokens=6, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
        found = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options, **WAYS[way])
        return found.sequences, found.logits

    def run(name):
        with in_context(model, name):
            return generate(model)

    expected = alone(model, generate)
    names = [*NAMES, None] * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, names))
    for name, (sequences, logits) in zip(names, found):
        if way != "sampled":
            assert torch.equal(sequences, expected[name][0])
            continue
        with in_context(model, name):  # threads share the random numbers, so the tokens differ
            whole = logits_of(model, sequences)[:, tokens.shape[1] - 1 : -1]
        torch.testing.assert_close(torch.stack(logits, 1), whole, atol=1e-4, rtol=1e-4)


def test_set_memory_outside_of_contexts_is_the_default_of_every_thread_that_is_in_none(shared):
    inside, go = threading.Barrier(2), threading.Event()

    def in_a_context():
        with use_memory(shared, "medicine"):
            inside.wait()
            go.wait()
            return active_memory(shared)

    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(in_a_context)
        inside.wait()
        set_memory(shared, "music")
        assert pool.submit(active_memory, shared).result() == "music"
        go.set()
        assert running.result() == "medicine"


def test_a_thread_does_not_inherit_a_context_unless_it_is_given_one(shared):
    found = []
    with use_memory(shared, "music"):
        context = contextvars.copy_context()
        plain = threading.Thread(target=lambda: found.append(active_memory(shared)))
        given = threading.Thread(target=context.run, args=(lambda: found.append(active_memory(shared)),))
        for thread in (plain, given):
            thread.start()
            thread.join()
    assert found == ["law", "music"]


# asyncio


def test_tasks_that_take_turns_on_one_thread_keep_their_own_memory(shared, tokens):
    expected = alone(shared, lambda model: logits_of(model, tokens))

    async def run(name):
        with in_context(shared, name):
            for _ in range(4):
                await asyncio.sleep(0)
                assert active_memory(shared) == name
                assert_same(logits_of(shared, tokens), expected[name])
                assert_same(await asyncio.to_thread(logits_of, shared, tokens), expected[name])

    async def all_of_them():
        await asyncio.gather(*(run(name) for name in (*NAMES, None, *NAMES)))
        assert active_memory(shared) == "law"

    asyncio.run(all_of_them())


def test_a_task_keeps_what_was_in_force_where_it_was_started(shared):
    async def later(go):
        await go.wait()
        return active_memory(shared)

    async def run():
        go = asyncio.Event()
        with use_memory(shared, "music"):
            task = asyncio.create_task(later(go))
            await asyncio.sleep(0)
            set_memory(shared, "medicine")
        go.set()
        return await task

    assert asyncio.run(run()) == "music"


@pytest.mark.parametrize("begun", ["disable_memory", "use_memory"])
def test_threads_without_a_memory_stay_so_when_the_first_is_attached_elsewhere(tokens, begun):
    model = tiny_model("olmoe")
    base, memory = logits_of(model, tokens), random_memory(model)
    with disable_memory(model) if begun == "disable_memory" else use_memory(model, None):
        in_thread(attach_memory, model, memory)
        assert active_memory(model) is None and torch.equal(logits_of(model, tokens), base)
        assert in_thread(active_memory, model) == "default"
    assert not torch.equal(logits_of(model, tokens), base)


def test_memories_attached_and_detached_by_threads_all_arrive(tokens):
    model = tiny_model("olmoe")
    base, memories = logits_of(model, tokens), [random_memory(model, seed=seed) for seed in range(4)]

    def run(i):
        for _ in range(5):
            attach_memory(model, memories[i], f"memory {i}")
            with use_memory(model, f"memory {i}"):
                found = logits_of(model, tokens)
            detach_memory(model, f"memory {i}")
        return found

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(4)))
    assert not hooks_of(model) and torch.equal(logits_of(model, tokens), base)
    for i, memory in enumerate(memories):
        attach_memory(model, memory, str(i))
        assert_same(logits_of(model, tokens), found[i])


# who is told of lookups


def test_an_observer_hears_its_own_thread_and_tasks_alone(shared, tokens):
    seen, other, watching, done = [], [], threading.Barrier(2), threading.Event()

    def elsewhere():
        with watch_lookups(shared, other.append):
            watching.wait()
            done.wait()
            logits_of(shared, tokens)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(elsewhere)
        watching.wait()
        with watch_lookups(shared, seen.append):
            logits_of(shared, tokens)
            done.set()
            running.result()
    assert len(seen) == 2 and len(other) == 2 and not {id(event) for event in seen} & {id(event) for event in other}


def test_an_override_that_runs_another_model_does_not_mix_up_the_calls(shared, tokens):
    helper = tiny_model("olmoe", seed=3)
    attach_memory(helper, random_memory(helper))
    expected = logits_of(shared, tokens)
    wanted, found = logits_of(helper, tokens), []

    def asks(x, output, call):
        found.append(logits_of(helper, tokens))

    attach_override(shared, {0: asks, 1: asks}, "asks")
    with use_memory(shared, "law"):
        assert torch.equal(logits_of(shared, tokens), expected) and not found
    logits_of(shared, tokens)
    assert len(found) == 2 and all(torch.equal(one, wanted) for one in found)


# builds


@pytest.mark.parametrize("attached", [False, True])
def test_a_build_in_one_thread_and_generations_in_another_do_not_meet(tmp_path, tokens, attached):
    model = tiny_model("olmoe")
    if attached:
        attach_memory(model, random_memory(model), "law")
    expected, wanted = generated(model, tokens), build(tiny_model("olmoe"), tmp_path / "alone")
    trainer = trainer_for(model, tmp_path / "beside", trainer=dict(memory_name="new"))
    with use_memory(model, "law") if attached else disable_memory(model):
        with ThreadPoolExecutor(1) as pool:
            building = pool.submit(trainer.train)
            while not building.done():
                assert torch.equal(generated(model, tokens), expected)
        building.result()
        assert active_memory(model) == ("law" if attached else None)
    assert active_memory(model) == "new"
    for layer, rows in wanted.layers.items():
        assert_same(trainer.memory.layers[layer].decoded_keys, rows.decoded_keys)
        assert_same(trainer.memory.layers[layer].values.floats(), rows.values.floats())
