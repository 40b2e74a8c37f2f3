"""The harness's Hugging Face model with a method applied around its requests, and a record of the responses."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from knnmoe_hf.baselines.base import Method
from knnmoe_hf.baselines.frozen import Frozen
from knnmoe_hf.comparison.costs import Passes, counted, wait
from knnmoe_hf.comparison.plan import digest
from knnmoe_hf.comparison.record import Entry, Record, Spent
from knnmoe_hf.tasks.items import Prompt
from knnmoe_hf.tasks.loading import without_warnings

TURNS = 3
"""At how many places, spread over the items, the frozen model and the method answer the same items, to be timed."""
TIMED = 8
"""Items at each of these places, at most."""

Item = list[tuple[str, Instance]]
"""The requests of one item (of one prompt of it, for methods that take prompts), with their keys."""


class MethodLM(HFLM):
    """
    A loaded model, adapted by a fitted method while it answers.

    Methods with `per_item`, and those that put tokens before the prompt, get each prompt as the harness encodes it,
    and answer the items one by one; all others are applied around the whole call, one sequence after the other where
    they depend on the batch (`by_batch`). Responses are those of the harness's own `HFLM` and are recorded as they
    come; what is in the record is not computed again.

    Args:
        model: a supported model, in eval mode.
        tokenizer: the model's.
        method: fitted on this model; the frozen model by default.
        prompt_of: gives the `Prompt` of a request, given its tokens without the answer.
        record: of this method's responses on this task; a new one by default.
        batch_size: items that are answered at once, by methods that can.
        progress: label of a progress bar; None shows none.
        timed: whether the frozen model answers some of the items too, in turns with the method, to compare seconds.
        one_by_one: whether every method answers the items one by one.
        seed: of texts that a task has drawn at random. Each is drawn by itself, with random numbers of its own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer,
        method: Method | None = None,
        prompt_of: Callable[[Instance, tuple[int, ...]], Prompt] | None = None,
        record: Record | None = None,
        batch_size: int = 8,
        progress: str | None = None,
        timed: bool = False,
        one_by_one: bool = False,
        seed: int = 0,
    ):
        self.method = method if method is not None else Frozen()
        size = 1 if self.method.by_batch else batch_size
        with without_warnings("lm_eval.models.huggingface"):  # it warns that it was given a loaded model
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=size)
        self.record = record if record is not None else Record()
        self._prompt_of = prompt_of or _plain_prompt
        self._progress, self._timed = progress, timed and not isinstance(self.method, Frozen)
        self._base, self._seed = model, seed
        self._one_by_one = one_by_one or _takes_prompts(self.method)
        self._in_force: Method = Frozen()
        self._requests: Sequence[Instance] = ()
        self._before = 0  # tokens that the last prompt got
        self.around: Callable[[], AbstractContextManager] = nullcontext
        """Entered around each call of the harness's model, inside the method's context."""

    # what the harness calls

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each request."""
        return [tuple(found) for found in self._answers(requests, super().loglikelihood)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text of each request."""
        return self._answers(requests, super().generate_until)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """
        Log-likelihood of whole texts.

        Raises:
            ValueError: for a method that needs a prompt, which such a text has not.
        """
        if _takes_prompts(self.method):
            name = type(self.method).__name__
            raise ValueError(f"{name} adapts the model to a prompt, and a text that is scored as a whole has none.")
        return self._answers(requests, super().loglikelihood_rolling)

    # items, one after the other or in batches

    def _answers(self, requests: Sequence[Instance], harness: Callable) -> list[Any]:
        """The responses of requests, from the record or computed in the order of their length."""
        keys = request_keys(requests)
        items: dict[tuple, Item] = {}
        for key, request in zip(keys, requests):
            apart = str(request.args[0]) if self._one_by_one else ""
            items.setdefault((item_key(request), apart), []).append((key, request))
        longest_first = sorted(items.values(), key=lambda item: -len(str(item[0][1].args[0])))
        size = 1 if self._one_by_one else self.batch_size
        batches = [longest_first[start : start + size] for start in range(0, len(longest_first), size)]
        # batches are those of a run that was never interrupted, and so are the responses, to the bit
        batches = [batch for batch in batches if any(key not in self.record for item in batch for key, _ in item)]
        hidden = self._progress is None or not batches
        with tqdm(total=sum(map(len, batches)), desc=self._progress, disable=hidden, leave=False) as bar:
            with counted(self._base) as passes:
                for turn in range(TURNS):
                    part = batches[len(batches) * turn // TURNS : len(batches) * (turn + 1) // TURNS]
                    self._answer_part(part, passes, harness, bar)
        return [self.record[key].response for key in keys]

    def _answer_part(self, batches: list[list[Item]], passes: Passes, harness: Callable, bar: tqdm) -> None:
        """Answers batches and records it; the frozen model answers the first of them too, if timed."""
        per_turn = -(-TIMED // max(1, len(batches[0]))) if batches else 0
        frozen = self._frozen_seconds(batches[:per_turn], harness) if self._timed else []
        with ExitStack() as stack:
            if batches and not _takes_prompts(self.method):
                stack.enter_context(self._applied(self.method))
            for number, batch in enumerate(batches):
                seconds = frozen[number] if number < len(frozen) else None
                self.record.add(self._answer(batch, passes, harness, seconds))
                bar.update(len(batch))

    def _answer(self, batch: list[Item], passes: Passes, harness: Callable, frozen: float | None) -> list[Entry]:
        asked = [one for item in batch for one in item]
        before = (passes.forward, passes.backward, passes.tokens)
        self._before = 0
        seconds, responses = self._run(asked, harness, self.method)
        after = (passes.forward, passes.backward, passes.tokens)
        share = 1 / len(asked)
        spent = Spent(
            *((b - a) * share for a, b in zip(before, after)),
            seconds=seconds * share,
            prompt_tokens=self._before * share,
            frozen_seconds=None if frozen is None else frozen * share,
        )
        # lists, as they are read back from a file
        found = [list(one) if isinstance(one, tuple) else one for one in responses]
        return [Entry(key, item_key(one), response, spent) for (key, one), response in zip(asked, found)]

    def _frozen_seconds(self, batches: list[list[Item]], harness: Callable) -> list[float]:
        with self._applied(Frozen()):
            runs = [[one for item in batch for one in item] for batch in batches]
            return [self._run(asked, harness, Frozen())[0] for asked in runs]

    def _run(self, asked: Item, harness: Callable, method: Method) -> tuple[float, list[Any]]:
        """Seconds and responses of calls of the harness's model; the method is in force already or takes prompts."""
        self._in_force = method
        drawn = any(is_drawn(request) for _, request in asked)
        wait(self._base)
        started = time.perf_counter()
        responses = []
        for part in [[one] for one in asked] if drawn else [asked]:
            self._requests = [request for _, request in part]
            with torch.random.fork_rng(enabled=drawn):
                if drawn:  # by numbers of its own, so that neither other texts nor earlier runs change it
                    torch.manual_seed(int(digest(part[0][0], self._seed)[:15], 16))
                responses += harness(self._requests, disable_tqdm=True)
        wait(self._base)
        return time.perf_counter() - started, responses

    # the method around the model

    @contextmanager
    def _applied(self, method: Method, prompt: Prompt | None = None) -> Iterator[None]:
        """Inside this context the harness calls the model that the method adapted."""
        with method.apply(self._base, prompt) as adapted:
            self._model = adapted
            try:
                yield
            finally:
                self._model = self._base

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        """Of ((context, continuation), tokens of the context, tokens of the continuation), as the harness encodes."""
        if not _takes_prompts(self._in_force):
            with self.around():
                return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        found: dict[int, tuple[float, bool]] = {}
        for context, numbers in _by_context(requests).items():
            room = self.max_length + 1 - max(len(requests[i][2]) for i in numbers)
            prompt = self._prompt_of(self._requests[numbers[0]], context[-room:])
            prompt_tokens = self._with_prefix(prompt, room)
            self._before = max(self._before, len(prompt_tokens) - len(prompt.tokens))
            batch = [(requests[i][0], prompt_tokens, requests[i][2]) for i in numbers]
            with self._applied(self._in_force, prompt), self.around():
                answers = super()._loglikelihood_tokens(batch, disable_tqdm=True)
            found |= dict(zip(numbers, answers))
        return [found[i] for i in range(len(requests))]

    def _with_prefix(self, prompt: Prompt, room: int) -> list[int]:
        """Tokens of a prompt after those that the method puts before it, of which the first are cut to fit in."""
        before = self._in_force.prepend(prompt)
        left = room - len(prompt.tokens)
        return [*(before[-left:] if left else ()), *prompt.tokens]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **how) -> Tensor:
        """Of prompts (B, S): (B, longer), as the harness does; all are the same for a method that takes prompts."""
        if not _takes_prompts(self._in_force):
            with self.around():
                return super()._model_generate(context, max_length, stop, **how)
        prompt = self._prompt_of(self._requests[0], tuple(context[0].tolist()))
        tokens = self._with_prefix(prompt, self.max_length - (max_length - context.shape[1]))
        before = len(tokens) - context.shape[1]
        self._before = max(self._before, before)
        ids = torch.tensor([tokens] * len(context), device=context.device)
        how["attention_mask"] = torch.ones_like(ids)
        with self._applied(self._in_force, prompt), self.around():
            return super()._model_generate(ids, max_length + before, stop, **how)[:, before:]


def item_key(request: Instance) -> str:
    """Which item of which task of the harness a request is about."""
    return f"{request.task_name}/{request.doc_id}"


def request_keys(requests: Sequence[Instance]) -> list[str]:
    """A key for each request: the same in every run, and another one for each repetition of a request."""
    seen: dict[str, int] = {}
    keys = []
    for request in requests:
        key = digest(request.request_type, request.task_name, request.doc_id, request.idx, list(request.args))
        seen[key] = seen.get(key, -1) + 1
        keys.append(f"{key}-{seen[key]}" if seen[key] else key)
    return keys


def is_drawn(request: Instance) -> bool:
    """Whether the text of a request is drawn at random, by the rule of the harness."""
    if request.request_type != "generate_until":
        return False
    how = request.args[1]
    return bool(how.get("temperature") if how.get("do_sample") is None else how["do_sample"])


def _takes_prompts(method: Method) -> bool:
    return method.per_item or "prompt" in method.acts_on


def _by_context(requests) -> dict[tuple[int, ...], list[int]]:
    """Numbers of the requests with each context, by its tokens."""
    found: dict[tuple[int, ...], list[int]] = {}
    for number, (_, context, _) in enumerate(requests):
        found.setdefault(tuple(context), []).append(number)
    return found


def _plain_prompt(request: Instance, tokens: tuple[int, ...]) -> Prompt:
    return Prompt(item_key(request), tokens, str(request.args[0]))
