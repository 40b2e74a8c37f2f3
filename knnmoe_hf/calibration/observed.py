"""All that a calibration observes: held-out references, and background text by kind."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from knnmoe_hf.calibration.held_out import hold_out
from knnmoe_hf.calibration.observe import Observation, observe
from knnmoe_hf.distributed import Processes
from knnmoe_hf.errors import shown
from knnmoe_hf.models.attach import AttachedMemory


class Observed(NamedTuple):
    """
    What a calibration is fitted to.

    Attributes:
        references: observation of held-out references, by the memory without them.
        kinds: of background text, by kind.
        excluded: kinds that the memory helps on.
        held: the held-out references.
        rest: the memory without them.
    """

    references: Observation
    kinds: dict[str, Observation]
    excluded: list[str]
    held: Sequence[dict]
    rest: AttachedMemory


def observe_all(
    model: nn.Module,
    prepared: AttachedMemory,
    texts: Mapping[str, Sequence[dict]],
    batch_size: int,
    processes: Processes,
    num_voters: int | None,
) -> Observed | str:
    """What is observed (arguments as of `observe`); or else, in words, what there is too little of."""
    if not len(prepared.memory):
        return "there are no rows to calibrate, which max_rows and min_gain left out"
    held = hold_out(prepared.memory)
    observed = observe(model, prepared, texts, batch_size, processes, num_voters) if held is not None else {}
    if not observed:
        what = "is no background text" if held is not None else "are no references that can be held out"
        if (known := prepared.memory.provenance) is None or not known.has_text:
            what = "is no text of the references, which provenance='ids' and 'none' leave out,"
        return f"there {what} to calibrate by"
    kinds = {kind: observation for kind, observation in observed.items() if observation.rise.mean() > 0}
    if not kinds:
        return f"the memory helps on all background text ({shown(list(observed))})"
    rest = prepared.with_rows_of(prepared.memory.take(held.rest))
    of_held = observe(model, rest, {"references": held.rows}, batch_size, processes, num_voters)
    excluded = [kind for kind in observed if kind not in kinds]
    return Observed(of_held["references"], kinds, excluded, held.rows, rest)
