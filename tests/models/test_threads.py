"""Several threads may run one model with a memory at once."""

from concurrent.futures import ThreadPoolExecutor

import torch

from knnmoe_hf import attach_memory
from tests.conftest import random_memory, tiny_model


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
        torch.testing.assert_close(logits, expected[i % 4], atol=1e-5, rtol=1e-5)
