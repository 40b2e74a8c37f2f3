"""Any faults at any requests: a push or pull is whole, or one sentence says why it is not; no commit holds a half."""

import random

import pytest

from knnmoe_hf import RoutingMemory
from tests.memory.helpers import full_memory, tiny_tokenizer
from tests.support.hub import HubServer
from tests.support.models import tiny_model

ROUNDS = 40


def add_faults(hub: HubServer, chance: random.Random) -> None:
    """A few, at requests that nobody has chosen."""
    for _ in range(chance.randint(1, 4)):
        where = dict(pattern=chance.choice(["", "^GET", "^HEAD", "^POST", "^PUT"]), skip=chance.randrange(12))
        where["times"] = chance.choice([1, 1, 2, 3, 8])
        kind = chance.randrange(5)
        if kind == 0:
            hub.faults.fail(status=chance.choice([400, 403, 404, 408, 409, 412, 429, 500, 502, 503, 504]), **where)
        elif kind == 1:
            hub.faults.fail(status=chance.choice([500, 502]), body="<html>\n<body>Bad gateway</body></html>", **where)
        elif kind == 2:
            hub.faults.drop_answer(**where)
        elif kind == 3:
            hub.faults.drop_download(after=chance.randrange(5_000), **where)
        else:
            hub.faults.drop_upload(after=chance.randrange(5_000), **where)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_any_faults(hub, seed):
    chance = random.Random(seed)
    model, tokenizer = tiny_model("olmoe"), tiny_tokenizer()
    memories = {}
    for count in range(2, 6):
        memories[10 * count] = full_memory(model, range(count), tokenizer=tokenizer if count % 2 else None)
    whole = set()
    for _ in range(ROUNDS):
        hub.faults.clear()
        add_faults(hub, chance)
        rows, size = chance.choice(list(memories)), chance.choice(["4KB", "2GB"])
        try:
            memories[rows].push_to_hub("memory", max_shard_size=size)
        except (OSError, ValueError) as error:
            assert "\n" not in str(error) and len(str(error)) < 600, error
        hub.faults.clear()
        if "me/memory" not in hub.store.repositories:
            continue
        for commit in hub.commits("me/memory")[:-1]:
            if commit.oid not in whole:
                whole.add(commit.oid)
                assert (
                    len(RoutingMemory.from_pretrained("me/memory", revision=commit.oid, force_download=True))
                    in memories
                )
        if not whole:
            continue
        add_faults(hub, chance)
        try:
            assert len(RoutingMemory.from_pretrained("me/memory", force_download=chance.random() < 0.5)) in memories
        except (OSError, ValueError) as error:
            assert "\n" not in str(error) and len(str(error)) < 600, error
    assert len(whole) > ROUNDS / 4
