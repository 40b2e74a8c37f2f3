"""
Opens mutated memories in a process of its own, and reports what became of them: `python -m tests.memory.fuzz.opening
SEED COUNT FOLDER`.

The process may allocate no more than `MORE_BYTES` beside what it has when it begins; what takes longer than `SECONDS`
counts as hanging.
"""

import collections
import json
import logging
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import torch

from knnmoe_hf import RoutingMemory, attach_memory, detach_memory
from tests.memory.fuzz.artefacts import small_artefacts, write
from tests.memory.fuzz.mutate import Mutator
from tests.support.models import tiny_model

MORE_BYTES, SECONDS = 2**30, 20
LONGEST = 2000
"""Letters of an error: a path, a cause that is cut to 300 letters, and the way out."""


class TooLong(BaseException):
    """Opening takes too long; no `Exception`, so that nobody catches it."""


def _hangs(*_) -> None:
    raise TooLong


class Model:
    """The tiny model that everything is attached to, and what it gives without a memory."""

    def __init__(self):
        self.model = tiny_model("olmoe").eval()
        self.ids = torch.arange(1, 8)[None]
        self.hooks = self._hooks()
        self.logits = self._logits()

    def _logits(self) -> torch.Tensor:
        with torch.no_grad():
            return self.model(input_ids=self.ids).logits

    def _hooks(self) -> int:
        parts = self.model.modules()
        return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts)

    def is_finite_with(self, memory: RoutingMemory) -> bool:
        """Attaches the memory; whether logits of a prompt and of a decoded token are finite."""
        attach_memory(self.model, memory)
        try:
            with torch.no_grad():
                prompt = self.model(input_ids=self.ids, use_cache=True)
                step = self.model(input_ids=self.ids[:, :1], past_key_values=prompt.past_key_values)
        finally:
            detach_memory(self.model)
        return bool(prompt.logits.isfinite().all() and step.logits.isfinite().all())

    def is_untouched(self, exactly: bool) -> bool:
        """Whether no hook is left and, if asked for, logits are to the bit what they were."""
        return self._hooks() == self.hooks and (not exactly or torch.equal(self._logits(), self.logits))


def outcome(folder: Path, base: Model, mmap: bool) -> str:
    """`"refused"`, `"opened"`, or what must not be."""
    signal.alarm(SECONDS)
    try:
        return "opened" if base.is_finite_with(RoutingMemory.from_pretrained(folder, mmap=mmap)) else "not finite"
    except ValueError as error:
        message = str(error)
        sound = message.isprintable() and message.endswith(".") and len(message) < LONGEST
        return "refused" if sound else f"refused with {message!r}"
    except TooLong:
        return "hangs"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)


def main(seed: int, count: int, place: Path) -> None:
    """Prints `{outcome: count}`, the bad ones in full, and the largest growth of memory in bytes, as JSON."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ["KNNMOE_CACHE"] = str(place / "cache")
    victim = place / "victim"
    victim.write_text("nobody may read, move or delete this")
    artefacts, base = small_artefacts(place / "sound"), Model()
    found, bad, folder = collections.Counter(), [], place / "in" / "memory"
    folder.parent.mkdir()
    (place / "cache").mkdir()
    around = sorted(os.listdir(place))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MORE_BYTES,) * 2)
    signal.signal(signal.SIGALRM, _hangs)
    for number, (done, files) in zip(range(count), Mutator(artefacts, seed, str(victim))):
        write(files, folder)
        what = outcome(folder, base, mmap=number % 8 != 0)
        if (what == "opened" or number % 10 == 0) and not base.is_untouched(exactly=number % 100 == 0):
            what = f"the model is not what it was after: {what}"
        if sorted(os.listdir(place)) != around or os.listdir(folder.parent) != [folder.name]:
            what = f"something outside is not what it was after: {what}"
        shutil.rmtree(folder)
        found[what if what in ("refused", "opened") else "bad"] += 1
        if what not in ("refused", "opened"):
            bad.append(f"{number} ({done}): {what}")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"found": found, "bad": bad[:30], "grown": grown}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
