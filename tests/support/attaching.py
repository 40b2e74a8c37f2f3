"""A memory in force for the length of a `with` block."""

from contextlib import contextmanager

from knnmoe_hf import active_memory, attach_memory, detach_memory, set_memory


@contextmanager
def attached(model, memory):
    before, name = active_memory(model), "under test"
    attach_memory(model, memory, name)
    try:
        yield
    finally:
        detach_memory(model, name)
        if before is not None:
            set_memory(model, before)
