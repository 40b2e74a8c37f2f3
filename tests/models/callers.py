"""What several callers of one model share: its memories, what each gets alone, and changes while something runs."""

from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from knnmoe_hf import attach_memory, detach_memory, disable_memory, set_memory, use_memory
from tests.support.models import random_memory, tiny_model

NAMES = ("law", "medicine", "music")


def logits_of(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **options).logits


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


def halfway(model, action):
    """Does something between the two layers of the next forward."""
    handle = model.model.layers[0].register_forward_hook(lambda *_: (handle.remove(), action(), None)[-1])
