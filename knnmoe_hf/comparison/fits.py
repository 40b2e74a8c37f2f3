"""Fitting methods on references, and keeping what was fitted for the next run."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from knnmoe_hf.baselines.base import Method
from knnmoe_hf.comparison.costs import Passes, counted
from knnmoe_hf.comparison.plan import digest
from knnmoe_hf.files import write_json
from knnmoe_hf.tasks.items import Item

_FIT = "fit.json"
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Fit:
    """
    What a fit took, in the run that made it.

    Attributes:
        seconds: wall time.
        forward, backward: passes of the model, one example through all layers each.
    """

    seconds: float
    forward: int
    backward: int


def fit_or_load(
    method: Method,
    model: PreTrainedModel,
    references: Sequence[Item],
    tokenizer,
    seed: int,
    folder: Path,
    of: str,
    progress: str | None = None,
) -> Fit:
    """
    Fits a method, or loads its fit if an earlier run has saved one.

    Args:
        method: to be fitted.
        model, references, tokenizer, seed: as `Method.fit` takes them.
        folder: of all fits on these references; methods of one `fit_key` share a fit.
        of: digest of model, references and seed.
        progress: label of a progress bar of forward passes, whose number is estimated; None shows none.

    Raises:
        ValueError: as `Method.fit` does.
    """
    place = folder / digest(method.fit_key, of)
    if (place / _FIT).exists():
        method.load(model, references, place)
        return Fit(**json.loads((place / _FIT).read_text(encoding="utf-8")))
    with _bar(progress, round(method.fit_passes * len(references))) as tell, counted(model, tell) as passes:
        method.fit(model, references, seed=seed, tokenizer=tokenizer)
    fit = Fit(passes.seconds, passes.forward, passes.backward)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_UNFINISHED}*"):  # left by a run that was killed while it saved
        shutil.rmtree(left, ignore_errors=True)
    unfinished = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        method.save(unfinished / "fit")
        write_json(unfinished / "fit" / _FIT, asdict(fit))
        if place.exists():  # without its last file, left by a run that was killed
            shutil.rmtree(place)
        (unfinished / "fit").rename(place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return fit


@contextmanager
def _bar(label: str | None, about: int) -> Iterator[Callable[[Passes], object]]:
    """A progress bar of about `about` forward passes; yields a function that takes the passes made so far."""
    hidden = label is None or not about
    with tqdm(total=about, desc=label, unit=" passes", disable=hidden, leave=False) as bar:

        def tell(passes: Passes) -> None:
            if not hidden:
                bar.total = max(bar.total, passes.forward)
                bar.update(passes.forward - bar.n)

        yield tell


def digest_of_items(items: Sequence[Item]) -> str:
    """A digest of references: their tokens, choices and answers, in their order."""
    return digest([[item.prompt.tokens, item.choices, item.answer, item.prompt.text] for item in items])
