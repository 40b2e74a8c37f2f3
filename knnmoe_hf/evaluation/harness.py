"""The model type `knnmoe` of lm-evaluation-harness: a base model of transformers with a routing memory attached."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from lm_eval.models.huggingface import HFLM
from torch import Tensor

from knnmoe_hf.config import KNNMoEConfig
from knnmoe_hf.errors import shown
from knnmoe_hf.lookup.events import LookupEvent
from knnmoe_hf.lookup.options import OPTION_NAMES
from knnmoe_hf.memory import RoutingMemory
from knnmoe_hf.models.attach import attach_memory, watch_lookups

_HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")


class KNNMoELM(HFLM):
    """
    `--model knnmoe --model_args pretrained=BASE,memory=MEMORY`.

    Without a memory, and with `memory=none`, it is the harness's own `hf` in every respect.

    Args:
        pretrained: name of the base model; or of a memory, which is then loaded with its base model as by `hf`.
        memory: folder or repository of the memory; `none` for the base model alone.
        memory_revision, memory_subfolder: of that repository.
        kwargs: options of `KNNMoEConfig`, which replace those saved with the memory (`recall=both`,
            `num_neighbors=8`); all others are those of `HFLM` and of the base model's `from_pretrained`. A `peft`
            adapter is loaded before the memory is attached.

    Raises:
        ValueError: for an unknown option.
        MemoryFileError, MemoryMismatchError: if the memory cannot be read, or belongs to another model.
        RuntimeError: if the memory is not looked up in the first forward pass.
    """

    _unconsulted = False
    """Whether there is a memory of which no lookup has been seen."""

    def __init__(self, pretrained: str, **kwargs):
        if not isinstance(pretrained, str):
            raise ValueError(
                f"pretrained={shown(pretrained)} is not the name of a model: attach the memory to a loaded model with "
                "attach_memory, and give that to lm_eval.models.huggingface.HFLM."
            )
        super().__init__(pretrained, **kwargs)

    def _create_model(
        self,
        pretrained: str,
        memory: str | None = None,
        memory_revision: str | None = None,
        memory_subfolder: str = "",
        **kwargs,
    ) -> None:
        options = {name: _value(kwargs.pop(name)) for name in OPTION_NAMES if name in kwargs}
        opened = None
        if isinstance(self.config, KNNMoEConfig):
            if memory is not None:
                raise ValueError(
                    f"pretrained={shown(pretrained)} is itself a memory: name its base model there, or leave out "
                    f"memory={shown(memory)}."
                )
            kwargs |= options  # the auto class of transformers takes them
        elif memory is not None and _value(memory) is not None:
            where = dict(revision=_value(memory_revision) and str(memory_revision), subfolder=str(memory_subfolder))
            hub_options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
            opened = RoutingMemory.from_pretrained(str(memory), **where, **hub_options, **options)
        elif options:
            name, value = next(iter(options.items()))
            raise ValueError(f"{name}={shown(value)} needs a memory: give memory=DIR_OR_REPOSITORY, or leave it out.")
        try:
            super()._create_model(pretrained, **kwargs)
        except TypeError as error:
            raise _about_option(error) from error
        if opened is not None:
            attach_memory(self._model, opened)
        self._unconsulted = opened is not None or isinstance(self.config, KNNMoEConfig)

    def _model_call(self, inps: Tensor, **kwargs) -> Tensor:
        with self._memory_is_consulted():
            return super()._model_call(inps, **kwargs)

    def _model_generate(self, context: Tensor, **kwargs) -> Tensor:
        with self._memory_is_consulted():
            return super()._model_generate(context, **kwargs)

    @contextmanager
    def _memory_is_consulted(self) -> Iterator[None]:
        """Raises RuntimeError unless the memory is looked up inside this context; no longer checked once it was."""
        if not self._unconsulted:
            yield
            return
        seen: list[int] = []

        def see(event: LookupEvent) -> None:
            seen.append(event.layer)

        with watch_lookups(self.model, see):
            yield
        if not seen:
            raise RuntimeError(
                f"the memory of {shown(self.pretrained)} was not looked up once, so these would be the figures of the "
                "base model: give a memory that has rows, and do not run inside disable_memory."
            )
        self._unconsulted = False


def _value(value: object) -> object:
    """A value of `--model_args`, where `none` is a word like any other."""
    return None if isinstance(value, str) and value.lower() == "none" else value


def _about_option(error: TypeError) -> Exception:
    """What to say about an argument that the base model's class does not take; other errors as they are."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if found is None:
        return error
    return ValueError(
        f"{found[1]!r} is not an option of the model type knnmoe: choose among memory, memory_revision, "
        f"memory_subfolder, those of the model type hf, and {', '.join(OPTION_NAMES)}."
    )
