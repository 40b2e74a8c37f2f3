"""Many callers of one model: each thread and each asyncio task gets what it would get alone."""

import asyncio
import contextvars
import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from knnmoe_hf import (
    active_memory,
    attach_memory,
    attach_override,
    detach_memory,
    disable_memory,
    get_memory,
    set_memory,
    use_memory,
    watch_lookups,
)
from knnmoe_hf.evaluation import compare
from knnmoe_hf.models.hooks import RoutingHooks
from tests.evaluation.test_scores import examples
from tests.support.attaching import hooks_of
from tests.support.models import random_memory, tiny_model
from tests.support.training import build, trainer_for

NAMES = ("law", "medicine", "music")


def logits_of(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **options).logits


@pytest.fixture
def shared():
    """A model with three memories, of which the first is the default."""
    model = tiny_model("olmoe")
    for seed, name in enumerate(NAMES):
        attach_memory(model, random_memory(model, seed=seed + 1), name)
    set_memory(model, "law")
    return model


def in_context(model, name):
    return disable_memory(model) if name is None else use_memory(model, name)


def alone(model, run) -> dict:
    """What `run(model)` gives with each memory, and with none, while nobody else uses the model."""
    found = {}
    for name in (*NAMES, None):
        with in_context(model, name):
            found[name] = run(model)
    return found


def in_thread(function, *args):
    """Runs a function in a thread of its own, and returns what it returns."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


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


# contexts and how they end


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


# a switch while something runs


class Acting:
    """Does something once, in the middle of a generation."""

    def __init__(self, action, at=3):
        self.action, self.at, self.calls = action, at, 0

    def count(self):
        self.calls += 1
        if self.calls == self.at:
            self.action()


class ActingProcessor(Acting, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.count()
        return scores


class ActingCriterion(Acting, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self.count()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class ActingStreamer(Acting):
    def put(self, value):
        self.count()

    def end(self):
        pass


CALLBACKS = {
    "logits processor": lambda act: dict(logits_processor=LogitsProcessorList([ActingProcessor(act)])),
    "stopping criterion": lambda act: dict(stopping_criteria=StoppingCriteriaList([ActingCriterion(act)])),
    "streamer": lambda act: dict(streamer=ActingStreamer(act)),
}


def generated(model, ids, **options):
    return model.generate(ids[:1], max_new_tokens=8, do_sample=False, pad_token_id=0, **options)


CHANGES = {
    "set": lambda model: set_memory(model, "music"),
    "attach": lambda model: attach_memory(model, random_memory(tiny_model("olmoe"), seed=9), "new"),
    "detach another": lambda model: detach_memory(model, "music"),
    "detach it": lambda model: detach_memory(model, "law"),
    "detach all": detach_memory,
}


@pytest.mark.parametrize("where", ["here", "in a thread"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("callback", CALLBACKS)
@pytest.mark.parametrize("context", [False, True])
def test_a_generation_ends_with_what_it_began_with(shared, tokens, callback, change, where, context):
    expected, base = generated(shared, tokens), None
    with disable_memory(shared):
        base = generated(shared, tokens)

    def act():
        CHANGES[change](shared) if where == "here" else in_thread(CHANGES[change], shared)

    with use_memory(shared, "law") if context else nullcontext():
        found = generated(shared, tokens, **CALLBACKS[callback](act))
        assert torch.equal(found, expected)
        wanted = {"set": "music", "attach": "new", "detach another": "law"}.get(change)
        if context and where == "in a thread":
            wanted = "law"
        assert active_memory(shared) == wanted
        if wanted is None:
            assert torch.equal(generated(shared, tokens), base)
    if change == "detach all":
        assert not hooks_of(shared)


@pytest.mark.parametrize("where", ["here", "in a thread"])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_generation_that_began_without_a_memory_ends_without_one(tokens, callback, where):
    model = tiny_model("olmoe")
    base, memory = generated(model, tokens), random_memory(model)

    def act():
        attach_memory(model, memory) if where == "here" else in_thread(attach_memory, model, memory)

    assert torch.equal(generated(model, tokens, **CALLBACKS[callback](act)), base)
    assert active_memory(model) == "default" and not torch.equal(generated(model, tokens), base)
    detach_memory(model)
    assert not hooks_of(model)


def test_what_a_callback_runs_in_a_context_of_its_own_does_not_leak_into_the_generation(shared, tokens):
    expected = generated(shared, tokens)
    base = alone(shared, lambda model: logits_of(model, tokens))
    seen = []

    def act():  # as contrastive decoding does
        with disable_memory(shared):
            seen.append(torch.equal(logits_of(shared, tokens), base[None]))
        with use_memory(shared, "music"):
            seen.append(torch.equal(logits_of(shared, tokens), base["music"]))

    assert torch.equal(generated(shared, tokens, **CALLBACKS["logits processor"](act)), expected)
    assert seen == [True, True]


def test_an_assistant_keeps_its_own_memory_too(shared, tokens):
    assistant = copy.deepcopy(shared)
    expected, drafts = generated(shared, tokens), []
    drafting = assistant.model.register_forward_hook(lambda *_: drafts.append(active_memory(assistant)))
    callback = CALLBACKS["logits processor"](lambda: in_thread(set_memory, assistant, "music"))
    assert torch.equal(generated(shared, tokens, assistant_model=assistant, **callback), expected)
    drafting.remove()
    assert set(drafts) == {"law"} and active_memory(assistant) == "music"


def halfway(model, action):
    """Does something between the two layers of the next forward."""
    handle = model.model.layers[0].register_forward_hook(lambda *_: (handle.remove(), action(), None)[-1])


@pytest.mark.parametrize("where", ["here", "in a thread"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_ends_with_what_it_began_with(shared, tokens, change, where):
    expected = alone(shared, lambda model: logits_of(model, tokens))

    def act():
        CHANGES[change](shared) if where == "here" else in_thread(CHANGES[change], shared)

    halfway(shared, act)
    assert torch.equal(logits_of(shared, tokens), expected["law"])
    if change.startswith("detach ") and change != "detach another":
        assert torch.equal(logits_of(shared, tokens), expected[None])
    assert bool(hooks_of(shared)) == (change != "detach all")


@pytest.mark.parametrize("where", ["here", "in a thread"])
def test_a_forward_that_began_before_the_first_memory_was_attached_ends_without_it(family, tokens, where):
    model = tiny_model(family)
    base, memory = logits_of(model, tokens), random_memory(model)
    halfway(
        model, lambda: attach_memory(model, memory) if where == "here" else in_thread(attach_memory, model, memory)
    )
    assert torch.equal(logits_of(model, tokens), base)
    assert not torch.equal(logits_of(model, tokens), base)


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


@pytest.mark.parametrize("begun", ["disable_memory", "use_memory"])
def test_threads_without_a_memory_stay_so_when_the_first_is_attached_elsewhere(tokens, begun):
    model = tiny_model("olmoe")
    base, memory = logits_of(model, tokens), random_memory(model)
    with disable_memory(model) if begun == "disable_memory" else use_memory(model, None):
        in_thread(attach_memory, model, memory)
        assert active_memory(model) is None and torch.equal(logits_of(model, tokens), base)
        assert in_thread(active_memory, model) == "default"
    assert not torch.equal(logits_of(model, tokens), base)


def test_what_is_attached_inside_a_context_is_in_force_there_alone(shared):
    with use_memory(shared, "music"):
        attach_memory(shared, random_memory(shared, seed=9), "new")
        assert active_memory(shared) == "new" and in_thread(active_memory, shared) == "law"
    assert active_memory(shared) == "law"


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


# training


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("after", ["the context", "a switch", "detaching all", "detaching all in a thread"])
def test_a_backward_with_checkpoints_runs_with_what_the_forward_ran_with(shared, tokens, reentrant, after):
    model = shared.train()
    embedding = model.get_input_embeddings().weight

    def gradient(checkpoints):
        model.zero_grad()
        model.gradient_checkpointing_disable()
        if checkpoints:
            model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
        with use_memory(model, "music") if after == "the context" else nullcontext():
            loss = model(tokens, labels=tokens, use_cache=False).loss
        if checkpoints and after == "a switch":
            in_thread(set_memory, model, "music")
        elif checkpoints and after.startswith("detaching all"):
            in_thread(detach_memory, model) if after.endswith("thread") else detach_memory(model)
        loss.backward()
        return embedding.grad.clone()

    torch.testing.assert_close(gradient(False), gradient(True), atol=1e-6, rtol=1e-5)
    if after.startswith("detaching"):
        assert RoutingHooks.of(model) is None


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


# continuous batching

_CONTINUOUS = dict(use_cuda_graph=False, page_size=16, max_batch_tokens=64, num_blocks=64)


def batched(model, ids, **options):
    config = ContinuousBatchingConfig(**_CONTINUOUS)
    generation = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1)
    found = model.generate_batch(ids.tolist(), generation_config=generation, continuous_batching_config=config)
    return torch.tensor([answer.generated_tokens for answer in found.values()])


def test_continuous_batches_run_with_what_is_in_force_for_their_caller(shared, tokens):
    expected = alone(shared, lambda model: generated(model, tokens)[:, tokens.shape[1] :][:, :6])
    assert len({tuple(found.flatten().tolist()) for found in expected.values()}) > 2
    for name in (*NAMES, None):
        events = []
        with in_context(shared, name), watch_lookups(shared, events.append):
            found = batched(shared, tokens[:1])
        assert torch.equal(found, expected[name]) and bool(events) == (name is not None)
    assert RoutingHooks.of(shared).users == 0


@pytest.mark.parametrize("change", CHANGES)
def test_a_continuous_batch_ends_with_what_it_began_with(shared, tokens, change):
    expected = batched(shared, tokens)
    handle, calls = None, []

    def act(*_):
        calls.append(0)
        if len(calls) == 3:
            in_thread(CHANGES[change], shared)

    handle = shared.lm_head.register_forward_hook(act)
    assert torch.equal(batched(shared, tokens), expected)
    handle.remove()
    assert bool(hooks_of(shared)) == (change != "detach all")


def test_a_request_is_refused_where_another_memory_is_in_force_than_in_its_manager(shared, tokens):
    options = dict(continuous_batching_config=ContinuousBatchingConfig(**_CONTINUOUS), warmup=False)
    generation = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=-1)
    with use_memory(shared, "music"):
        with shared.continuous_batching_context_manager(generation_config=generation, **options) as manager:
            with disable_memory(shared):
                with pytest.raises(ValueError, match="no memory is in force where .* started with the memory 'music'"):
                    manager.add_request(tokens[0].tolist())
            manager.add_request(tokens[0].tolist(), request_id="mine")
            assert manager.get_result("mine", timeout=20).error is None


# builds and comparisons


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


@pytest.mark.parametrize("where", ["here", "in a thread"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_comparison_ends_with_what_it_began_with(shared, change, where):
    rows = examples()
    wanted = compare(shared, rows, batch_size=2)

    def act():
        CHANGES[change](shared) if where == "here" else in_thread(CHANGES[change], shared)

    halfway(shared, act)
    found = compare(shared, rows, batch_size=2)
    assert torch.equal(found.memory.nll, wanted.memory.nll) and torch.equal(found.base.nll, wanted.base.nll)
    assert found.confidence == wanted.confidence
