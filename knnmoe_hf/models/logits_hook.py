"""
The hook on a model's output embeddings, where recalled next tokens are mixed into the logits.

What a memory's last layer leaves in the tokens of a call (`Tokens.recalled`) meets the output of the output embeddings
here. Both are parts of one forward of the language model, whose own hooks know of which tokens logits are wanted
(`logits_to_keep`) and notice a forward that took its logits from elsewhere.
"""

import inspect
import sys
import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation import CandidateGenerator
from transformers.modeling_utils import slice_logits_to_keep

from knnmoe_hf.errors import UnsupportedModelError
from knnmoe_hf.lookup.logits import mix_next_tokens
from knnmoe_hf.models.calls import CallTokens

if TYPE_CHECKING:
    from knnmoe_hf.models.hooks import RoutingHooks

_KEEP = "logits_to_keep"
_here = threading.local()  # `.forward`: the `_Forward` that this thread runs, None outside of any


class _Forward:
    """
    One forward of a language model that carries hooks.

    Attributes:
        hooks: of its decoder.
        keep: its `logits_to_keep`.
        around: the forward, of another model, in which it runs, if there is one.
        tokens: of its decoder's call; None until that begins, or if no override is in force.
        times: how often the output embeddings have run.
    """

    def __init__(self, hooks: "RoutingHooks", keep: int | Tensor, around: "_Forward | None"):
        self.hooks, self.keep, self.around = hooks, keep, around
        self.tokens: CallTokens | None = None
        self.times = 0


def _running(hooks: "RoutingHooks") -> _Forward | None:
    """The forward of the model with these hooks that this thread runs."""
    forward = getattr(_here, "forward", None)
    return forward if forward is not None and forward.hooks is hooks else None


def tokens_arrived(hooks: "RoutingHooks", tokens: CallTokens | None) -> None:
    """To be called when the decoder with these hooks begins to run."""
    if (forward := _running(hooks)) is not None:
        forward.tokens = tokens


def forget_interrupted_logits() -> None:
    """No output embeddings of this thread take the tokens of a forward that was interrupted for their own."""
    _here.forward = None


def find_language_model(model: nn.Module, decoder: nn.Module) -> PreTrainedModel | None:
    """The innermost `PreTrainedModel` that contains this decoder and has output embeddings; None if there is none."""
    found = [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        and any(part is decoder for part in module.modules())
        and module.get_output_embeddings() is not None
    ]
    return found[-1] if found else None  # `modules` lists a model before its parts


def takes_logits_to_keep(model: nn.Module) -> int | None:
    """The place of `logits_to_keep` among the arguments of a language model; None if it does not take it."""
    names = list(inspect.signature(model.forward).parameters)
    return names.index(_KEEP) if _KEEP in names else None


class LogitsHooks:
    """
    The hooks on a language model and its output embeddings.

    Args:
        hooks: of the decoder.
        model: the language model, see `find_language_model`.

    Attributes:
        handles: of all hooks. Neither of the two modules is kept, and `hooks` do not refer to this object: in a cycle
            of references, a model and its memory would not be freed with the last reference to the model.
    """

    def __init__(self, hooks: "RoutingHooks", model: PreTrainedModel):
        self.hooks = hooks
        self.place = takes_logits_to_keep(model)
        self.handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            # always called, so that nothing of a forward that raised meets output embeddings that run later
            model.register_forward_hook(self._after_model, with_kwargs=True, always_call=True),
            # last of all, so that it sees what tensor parallelism has put together
            model.get_output_embeddings().register_forward_hook(_HeadHook(self)),
        ]

    @classmethod
    def of(cls, model: nn.Module, hooks: "RoutingHooks") -> "tuple[LogitsHooks, PreTrainedModel] | None":
        """Those of a decoder with these hooks, and the language model in `model` that they are on, if there is one."""
        for part in model.modules():
            for hook in list(part._forward_pre_hooks.values()):
                owner = getattr(hook, "__self__", None)
                if isinstance(owner, cls) and owner.hooks is hooks:
                    return owner, part
        return None

    def are_current(self, model: PreTrainedModel) -> bool:
        """Whether they are on the output embeddings that their language model has now."""
        hooks = list(model.get_output_embeddings()._forward_hooks.values())
        return any(isinstance(hook, _HeadHook) and hook.of is self for hook in hooks)

    def remove(self) -> None:
        """Removes them."""
        for handle in self.handles:
            handle.remove()

    # A hook that PyTorch looked up just before another thread removed it gets no keyword arguments.

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if kwargs is None:
            return
        keep = kwargs.get(_KEEP, 0)
        if self.place is not None and len(args) > self.place:
            keep = args[self.place]
        around = getattr(_here, "forward", None)
        if around is not None and around.hooks is self.hooks:  # it was interrupted: a model does not call itself
            around = around.around
        _here.forward = _Forward(self.hooks, keep, around)

    def _after_model(self, model: nn.Module, args: tuple, kwargs: dict | None = None, output=None) -> None:
        forward = _running(self.hooks)
        if forward is None:  # the hooks were put on the model during this forward
            return
        _here.forward = forward.around
        tokens = forward.tokens
        if output is None or tokens is None or tokens.overrides.recalling_layer not in tokens.routed:
            return  # it raised, or recalls nothing: early exit in assisted generation runs only the first layers
        kind = type(model).__name__
        if not self.are_current(model):
            raise UnsupportedModelError(
                f"this {kind} has other output embeddings than when the memory was attached, so that recalled tokens "
                "would be lost: detach it, and attach it again after resizing, wrapping or replacing them, or use "
                "disable_memory(model)."
            )
        if forward.times != 1:
            raise UnsupportedModelError(
                f"the output embeddings of this {kind} ran {forward.times} times in a forward with recalled next "
                "tokens in force, and must run once: switch off whatever computes logits or the loss without them "
                "(use_liger_kernel=False), or use disable_memory(model)."
            )

    def after_head(self, output: Tensor) -> Tensor | None:
        """The hook of the output embeddings."""
        forward = self._running_or_refused()
        if forward is None:
            return None
        forward.times += 1
        tokens = forward.tokens
        if tokens is None or (recalled := tokens.recalled) is None:
            return None
        transform = tokens.overrides.logits
        if transform is None:  # of overrides that look at what is recalled, and mix nothing
            return None
        if output.shape[-1] != transform.outputs:
            raise UnsupportedModelError(
                f"the output embeddings return {output.shape[-1]} numbers for each token, where they returned "
                f"{transform.outputs} when the memory was attached: detach it and attach it again, or use "
                "disable_memory(model)."
            )
        rows = output.shape[:-1].numel()
        places = _kept(tokens.shape, forward.keep, recalled.voters.rows.device)
        if places is not None:
            recalled = recalled.at(places)
        if recalled.tokens != rows:
            raise UnsupportedModelError(
                f"the output embeddings got {rows} tokens of a call of {list(tokens.shape)} whose logits_to_keep asks "
                f"for {recalled.tokens}: recalled tokens need all of these in their order, so switch off whatever "
                "splits or drops tokens, or use disable_memory(model)."
            )
        table = output.reshape(rows, output.shape[-1])
        return mix_next_tokens(table, recalled, transform).view(output.shape)

    def _running_or_refused(self) -> _Forward | None:
        """
        The forward of the model that the output embeddings run in; None if nothing is to be mixed in.

        Raises:
            UnsupportedModelError: if they run outside of any, and recalled tokens are in force.
        """
        forward = _running(self.hooks)
        tokens = forward.tokens if forward is not None else None
        overrides = tokens.overrides if tokens is not None else self.hooks.current
        if overrides.recalling_layer is None or torch.compiler.is_compiling():
            return forward
        runs, drafts = self._on_the_stack()
        if forward is not None and runs:
            return forward
        if forward is not None:  # it was interrupted, which PyTorch tells no hook
            forget_interrupted_logits()
        if self.hooks.current.recalling_layer is not None and not runs and not drafts:
            raise UnsupportedModelError(
                "the output embeddings ran outside of a forward of their model, so that the next tokens to recall "
                "are not known there: call the model itself instead of its `forward` or its parts, or use "
                "disable_memory(model)."
            )
        return None

    def _on_the_stack(self) -> tuple[bool, bool]:
        """
        Whether a forward of the model runs here, perhaps one that began before it had these hooks; and whether drafts
        for assisted generation are made here. Nothing is mixed into drafts, because the model itself, with recalled
        tokens, decides which of them are kept.
        """
        frame = sys._getframe(3)
        while frame is not None:
            if frame.f_code.co_name in ("_call_impl", "get_candidates"):
                owner = frame.f_locals.get("self")
                if isinstance(owner, nn.Module) and self._are_on(owner):
                    return True, False
                if isinstance(owner, CandidateGenerator):
                    return False, True
            frame = frame.f_back
        return False, False

    def _are_on(self, model: nn.Module) -> bool:
        return any(getattr(hook, "__self__", None) is self for hook in list(model._forward_pre_hooks.values()))


class _HeadHook:
    """
    Forward hook of the output embeddings.

    Attributes:
        of: the hooks that it belongs to; None in output embeddings that were copied without their model, as PEFT does
            for `modules_to_save`: these behave as without hooks.
    """

    def __init__(self, of: LogitsHooks | None):
        self.of = of

    def __call__(self, head: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        return None if self.of is None else self.of.after_head(output)

    def __deepcopy__(self, memo: dict) -> "_HeadHook":
        return _HeadHook(memo.get(id(self.of)))  # a model's hooks are copied before its parts


def _kept(shape: tuple[int, int], keep: int | Tensor, device: torch.device) -> Tensor | None:
    """
    The places among B * S tokens of those of which a model with this `logits_to_keep` computes logits, in its order:
    (T',) int64, made on this device if `keep` is a number; None for all of them.
    """
    if isinstance(keep, int) and (keep == 0 or keep >= shape[1]):
        return None
    device = keep.device if isinstance(keep, Tensor) else device
    places = torch.arange(shape[0] * shape[1], device=device).view(*shape, 1)
    return slice_logits_to_keep(places, keep).flatten()
