"""What every method is: fitted on references, applied to a model for a while, with its cost known."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.rules import GateOutput
from knnmoe_hf.models.calls import Overrides, RoutingOverride
from knnmoe_hf.models.gates import Gate, weights_of
from knnmoe_hf.models.hooks import using_overrides
from knnmoe_hf.tasks.items import Item, Prompt

_STATE = "state.safetensors"


@dataclass(frozen=True)
class Cost:
    """
    Passes of the model for each item besides those that score it; a pass is one example through all layers.

    Attributes:
        forward, backward: number of passes.
        prompt_tokens: tokens that are put before each prompt.
    """

    forward: float = 0.0
    backward: float = 0.0
    prompt_tokens: float = 0.0


def constant(default: Any, help: str, ours: bool = False) -> Any:
    """
    A field of a method's class.

    Args:
        default: the value; a list or dict is copied for each method.
        help: one sentence.
        ours: whether the value is our choice, because the method's source gives none.
    """
    how = {"default_factory": lambda: default.copy()} if isinstance(default, (list, dict)) else {"default": default}
    assert MISSING not in how.values()
    return field(metadata={"help": help, "ours": ours}, **how)


_KINDS = {
    int: "a whole number of at least 1",
    float: "a number of at least 0",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    type(None): "null",
}


def _check_constant(method: str, one: Field, value: Any) -> None:
    is_list, kinds = get_origin(one.type) is Sequence, get_args(one.type) or (one.type,)
    is_allowed = not is_list or (isinstance(value, (list, tuple)) and len(value) > 0)
    if not is_allowed or not all(any(_is(part, kind) for kind in kinds) for part in (value if is_list else [value])):
        words = " or ".join(_KINDS[kind] for kind in kinds)
        example = "; YAML reads 3e-4 as text, and 3.0e-4 as a number" if float in kinds else ""
        raise ValueError(
            f"{one.name}={shown(value)} of {method} is not allowed: use "
            f"{'a list, each part ' if is_list else ''}{words}{example}."
        )


def _is(value: Any, kind: type) -> bool:
    if kind not in (int, float):
        return isinstance(value, kind)
    numbers = int if kind is int else (int, float)
    return isinstance(value, numbers) and not isinstance(value, bool) and value >= (1 if kind is int else 0)


class Method(ABC):
    """
    One way to adapt a frozen model; a dataclass whose fields are its constants (`constant`).

    Attributes:
        source: the publication.
        acts_on: what it changes, of `"routing"`, `"logits"`, `"prompt"` and `"weights"`: an effect must be seen there,
            as a method without one is broken.
        keeps_weights: whether the model's weights stay as they are.
        per_item: whether `apply` needs to know the prompt, so that items are scored one by one.
        by_batch: whether it depends on the other sequences of a forward, so that a comparison runs each alone.
    """

    source: ClassVar[str]
    acts_on: ClassVar[tuple[str, ...]] = ("routing",)
    keeps_weights: ClassVar[bool] = True
    per_item: ClassVar[bool] = False
    by_batch: ClassVar[bool] = False

    def __post_init__(self):
        """
        Checks the kinds of all constants, so that no fit takes hours before one is refused.

        Raises:
            ValueError: for a constant of another kind than its field's, a whole number below 1 or a number below 0.
        """
        for one in fields(self):
            _check_constant(type(self).__name__, one, getattr(self, one.name))

    @abstractmethod
    def fit(self, model: nn.Module, references: Sequence[Item], seed: int = 0, tokenizer=None) -> None:
        """
        Learns what it needs from references; the model is unchanged afterwards.

        Args:
            model: a supported model, frozen, in eval mode.
            references: with their answers, in random order.
            seed: of everything random.
            tokenizer: of the model; only methods that read other text besides the references need it.

        Raises:
            ValueError: if there are too few references, saying how many are needed.
        """

    @abstractmethod
    @contextmanager
    def apply(self, model: nn.Module, prompt: Prompt | None = None) -> Iterator[nn.Module]:
        """
        Inside this context the yielded model is the adapted one; afterwards `model` is as before, also after an error.

        Args:
            model: the one that was given to `fit`.
            prompt: what is to be answered; needed by methods with `per_item`. All sequences that the model is given
                inside the context then begin with `prompt.tokens` (after `prepend`).
        """
        yield model

    def prepend(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids to put before a prompt: examples of the task, for methods that act on the prompt."""
        return ()

    @property
    def cost(self) -> Cost:
        """Passes for each item, not counting those that score it."""
        return Cost()

    @property
    def fit_passes(self) -> float:
        """About how often a fit runs each reference forward and backward, for an estimate of its time."""
        return 0.0

    def state(self) -> Mapping[str, Tensor]:
        """What was fitted, as tensors: what would be shipped beside the base model."""
        return {}

    def restore(self, model: nn.Module, references: Sequence[Item], state: Mapping[str, Tensor]) -> None:
        """In place of `fit`: takes over what `state` returned after a fit on the same model and references."""
        self.fit(model, references)

    @property
    def fit_key(self) -> str:
        """Names what `fit` finds: a method can `load` what another one with the same key saved."""
        return repr(self)

    def save(self, folder: str | PathLike) -> None:
        """Writes what was fitted into a new folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state().items()}
        save_file(tensors, Path(folder) / _STATE)

    def load(self, model: nn.Module, references: Sequence[Item], folder: str | PathLike) -> None:
        """In place of `fit`: takes over what a method with the same `fit_key` saved, fitted on the same arguments."""
        self.restore(model, references, load_file(Path(folder) / _STATE))

    @property
    def nbytes(self) -> int:
        """Bytes that would be shipped beside the base model."""
        return sum(tensor.nbytes for tensor in self.state().values())


class FittedTensors(Method):
    """A method whose `fit` finds nothing but tensors, which are kept by name in `_found`."""

    _found: Mapping[str, Tensor] | None = None

    @property
    def fit_passes(self) -> float:
        """One: `fit` runs each reference forward and backward once."""
        return 1.0

    def state(self) -> Mapping[str, Tensor]:
        """
        As `Method.state`.

        Raises:
            ValueError: before `fit`.
        """
        if self._found is None:
            raise ValueError(f"{type(self).__name__} has not been fitted: call fit or restore first.")
        return self._found

    def restore(self, model: nn.Module, references: Sequence[Item], state: Mapping[str, Tensor]) -> None:
        """As `Method.restore`; fits nothing."""
        self._found = dict(state)


@contextmanager
def overriding(model: nn.Module, overrides: Mapping[int, RoutingOverride]) -> Iterator[None]:
    """
    Inside this context these overrides, `{layer: override}`, decide the routing for the calling thread, in place of
    whatever is in force; nothing is probed, so that a context may be opened for each item.

    Raises:
        UnsupportedModelError: in a forward, if a gate with an override does not run.
    """
    with using_overrides(model, Overrides(overrides)):
        yield


@contextmanager
def with_trainer(model: nn.Module) -> Iterator[None]:
    """
    Inside this context a Trainer may run on a model of transformers. Afterwards the model's configurations, in which
    it turns caching off and takes over the tokenizer's tokens, and all random numbers, which it seeds, are as before.
    """
    configs = [one for one in (model.config, model.config.get_text_config(), model.generation_config) if one]
    kept = [dict(vars(one)) for one in configs]
    numbers, draws = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numbers)
        random.setstate(draws)
        for one, before in zip(configs, kept):
            vars(one).clear()
            vars(one).update(before)


def rerouted(gate: Gate, output: GateOutput, logits: Tensor) -> GateOutput:
    """
    A gate's output with other logits, routed by the family's own rule.

    The recorded logits are replaced too, but what counts are weights and ids: transformers' blocks read no others.

    Args:
        gate: of the layer.
        output: what it returned.
        logits: (T, E) of any float dtype, in which they are routed: small differences count in float32 alone.
            Gradients pass to them through the weights.

    Returns:
        Logits, weights and ids in the dtypes and on the device of `output`.
    """
    with weights_of(gate):
        rule = gate.current_rule().to(logits.device)
    return logits.to(output[0].dtype), *rule.routed(logits, output[2].shape[-1], output[1].dtype)
