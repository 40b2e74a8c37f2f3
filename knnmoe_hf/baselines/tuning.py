"""What methods that train by gradient descent share: the loop, the choice of a rate, weights put in and taken out."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from knnmoe_hf.baselines.base import FittedTensors, constant
from knnmoe_hf.data.batches import collate
from knnmoe_hf.errors import UnsupportedModelError, shown
from knnmoe_hf.evaluation.scores import score
from knnmoe_hf.models.attach import disable_memory
from knnmoe_hf.models.modes import frozen
from knnmoe_hf.models.offload import input_device
from knnmoe_hf.tasks.items import Item, Prompt, rows_of

RATES = "Rates of AdamW; of several, the best on held-out references is taken."
"""The help of `learning_rates`, whose defaults differ."""
_HELD_OUT = 5  # one reference in so many is held out to choose by, if there is a choice (ours)


@dataclass
class Tuned(FittedTensors):
    """
    A method that trains something on the references' next-token loss.

    With several candidates, each is trained without one reference in five, and the one under which those have the
    least mean NLL is trained again on all.

    Attributes:
        chosen: the candidate that was trained; None before `fit`, and after `restore`.
    """

    learning_rates: Sequence[float]
    epochs: int = constant(3, "Passes over the references.", ours=True)
    examples_per_step: int = constant(16, "References of a step.", ours=True)
    answer_only: bool = constant(True, "Whether only answers are targets, not questions.", ours=True)

    def __post_init__(self):
        super().__post_init__()
        self.chosen: Mapping[str, Any] | None = None

    @abstractmethod
    def _train(self, model: nn.Module, items: Sequence[Item], seed: int, **candidate) -> dict[str, Tensor]:
        """What is trained, by name; the model is unchanged afterwards. Its weights are frozen, no memory in force."""

    @abstractmethod
    @contextmanager
    def _with(self, model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """As `apply`, with this state."""

    def candidates(self) -> list[dict[str, Any]]:
        """Arguments of a training, one of which is chosen."""
        return [{"rate": rate} for rate in self.learning_rates]

    @property
    def fit_passes(self) -> float:
        """All trainings: those of the candidates, and the last one."""
        tried = len(self.candidates())
        return self.epochs * (1.0 if tried == 1 else 1.0 + tried * (1 - 1 / _HELD_OUT))

    def fit(self, model: nn.Module, references: Sequence[Item], seed: int = 0, tokenizer=None) -> None:
        """
        As `Method.fit`.

        Raises:
            ValueError: without references, or with too few to hold some out.
        """
        candidates, name = self.candidates(), type(self).__name__
        least = 1 if len(candidates) == 1 else _HELD_OUT
        if len(references) < least:
            way_out = "give more, or a single value for each constant" if least > 1 else "give some"
            raise ValueError(f"{len(references)} references are too few for {name}, which needs {least}: {way_out}.")
        with disable_memory(model), frozen(model, checkpointing=False):
            self.chosen = candidates[0] if len(candidates) == 1 else self._best(model, references, seed, candidates)
            self._found = self._train(model, references, seed, **self.chosen)

    def _best(self, model: nn.Module, references: Sequence[Item], seed: int, candidates: list[dict]) -> dict:
        kept = [item for at, item in enumerate(references) if at % _HELD_OUT]
        held_out = rows_of(references[::_HELD_OUT], self.answer_only)

        def nll(candidate: dict) -> float:
            with self._with(model, self._train(model, kept, seed, **candidate)) as adapted:
                found = score(adapted, held_out).mean_nll
            return found if found == found else float("inf")  # a training that diverged

        return min(candidates, key=nll)

    def restore(self, model: nn.Module, references: Sequence[Item], state: Mapping[str, Tensor]) -> None:
        """As `Method.restore`; `chosen` is not known then."""
        super().restore(model, references, state)
        self.chosen = None

    @contextmanager
    def apply(self, model: nn.Module, prompt: Prompt | None = None) -> Iterator[nn.Module]:
        """As `Method.apply`; raises ValueError before `fit`."""
        with disable_memory(model), self._with(model, self.state()) as adapted:
            yield adapted


def descend(
    parameters: Sequence[Tensor],
    count: int,
    loss_of: Callable[[list[int]], Tensor],
    rate: float,
    epochs: int,
    examples_per_step: int,
    seed: int,
    before_epoch: Callable[[], None] = lambda: None,
) -> None:
    """
    Trains parameters in place with AdamW without decay, the gradient's norm clipped to 1 (ours).

    Parameters in half precision are stepped as float32 copies, so that no small step is lost in rounding.

    Args:
        parameters: leaves; afterwards they require no gradients.
        count: number of examples.
        loss_of: the loss of the examples at these places, with a graph.
        rate, epochs, examples_per_step: as usual.
        seed: of the order of the examples, another one in each epoch.
        before_epoch: called at the beginning of each.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    stepped = [one if one.dtype == torch.float32 else one.detach().float().requires_grad_() for one in parameters]
    optimizer = torch.optim.AdamW(stepped, lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    try:
        for _ in range(epochs):
            before_epoch()
            for places in torch.randperm(count, generator=generator).split(examples_per_step):
                loss_of(places.tolist()).backward()
                _step(parameters, stepped, optimizer)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _step(parameters: Sequence[Tensor], stepped: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    copies = [(one, copy) for one, copy in zip(parameters, stepped) if copy is not one]
    for one, copy in copies:
        copy.grad, one.grad = None if one.grad is None else one.grad.float(), None
    nn.utils.clip_grad_norm_(stepped, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for one, copy in copies:
            one.copy_(copy)


def next_token_loss(model: nn.Module, rows: Sequence[dict]) -> Callable[[list[int]], Tensor]:
    """The model's own loss, the mean over the targets of a batch, of the rows at some places."""
    device = input_device(model)

    def loss(places: list[int]) -> Tensor:
        batch = collate([rows[place] for place in places])
        batch.pop("example_id")
        return model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).loss

    return loss


@contextmanager
def with_weights(weights: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """
    Inside this context weights have other values, which are tensors of their own; their own ones are not touched.

    Raises:
        UnsupportedModelError: for weights that are offloaded.
        ValueError: for values of other names or shapes.
    """
    if offloaded := [name for name, weight in weights.items() if weight.device.type == "meta"]:
        raise UnsupportedModelError(
            f"the weight {shown(offloaded[0])} is offloaded, so that no other value can be put in its place: load the "
            "model without offloading."
        )
    shapes = ({name: tuple(tensor.shape) for name, tensor in table.items()} for table in (weights, values))
    if next(shapes) != next(shapes):
        raise ValueError("the trained weights are not those of this model: fit the method on it.")
    own = {name: weight.data for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data = values[name].to(weight.device, weight.dtype)
        yield
    finally:
        for name, weight in weights.items():
            weight.data = own[name]
