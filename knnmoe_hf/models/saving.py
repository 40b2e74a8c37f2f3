"""Says, when a model's weights are saved, that its memory is not part of them."""

import logging
import sys
from collections.abc import Mapping

from torch import nn

from knnmoe_hf.models.calls import Overrides

logger = logging.getLogger(__name__)


class SavingHint:
    """
    Hook before a decoder's `state_dict` that says once that the weights of the model are not its memory.

    Args:
        named: the overrides attached to the model, by name.
    """

    def __init__(self, named: Mapping[str, Overrides]):
        self.named = named
        self._told = False

    def __call__(self, decoder: nn.Module, prefix: str, keep_vars: bool) -> None:
        names = [name for name, overrides in list(self.named.items()) if hasattr(overrides, "memory")]
        if self._told or not names or _is_loading():
            return
        self._told = True
        logger.warning(
            "saving the model does not save the memory attached to it (%s), which is not part of its weights: save it "
            "with knnmoe_hf.get_memory(model%s).save_pretrained(folder)",
            ", ".join(map(repr, names)),
            "" if len(names) == 1 else ", name",
        )


def _is_loading() -> bool:
    """Whether a library is loading an adapter or offloading weights: then too it asks for the model's weights."""
    frame = sys._getframe(1)
    while frame is not None:
        library, name = frame.f_globals.get("__name__", "").partition(".")[0], frame.f_code.co_name
        if library in ("peft", "transformers") and name.startswith(("load_", "_load_", "from_pretrained")):
            return True
        if library == "accelerate" and name in ("cpu_offload", "disk_offload", "dispatch_model"):
            return True
        frame = frame.f_back
    return False
