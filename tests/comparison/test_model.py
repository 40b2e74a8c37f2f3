"""`MethodLM` answers as the harness's own model does, item by item, in any batch size and order."""

import random

import pytest
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from knnmoe_hf.baselines import make_method
from knnmoe_hf.comparison.costs import counted
from knnmoe_hf.comparison.model import MethodLM, is_drawn
from knnmoe_hf.comparison.record import Record
from knnmoe_hf.models.hooks import RoutingHooks
from tests.comparison.helpers import ByPrompt, Prefix, Shift, requests_of, write_task
from tests.conftest import tiny_model
from tests.support.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, kind in (("small", "multiple_choice"), ("writing", "generate_until"), ("text", "loglikelihood_rolling")):
        write_task(folder, kind=kind, name=name)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model("olmoe", vocab_size=260, max_position_embeddings=256)


def harness(model, tokenizer, batch_size: int = 1) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, backend="causal")


def values(responses) -> torch.Tensor:
    return torch.tensor([loglikelihood for loglikelihood, _ in responses])


def test_the_frozen_model_is_scored_as_the_harness_scores_it(folder, model, tokenizer, monkeypatch):
    monkeypatch.setattr(evaluator, "add_env_info", lambda *_: None)  # runs programs for seconds
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = []
    for lm in (harness(model, tokenizer), MethodLM(model, tokenizer, batch_size=1)):
        results = evaluator.simple_evaluate(lm, tasks=["small"], task_manager=manager, bootstrap_iters=0)
        found.append(
            [(s["doc_hash"], s["acc"], s["acc_norm"], s["filtered_resps"]) for s in results["samples"]["small"]]
        )
    assert found[0] == found[1] and len(found[0]) == 12


BALANCED = make_method("laser", confident=9.0, threshold=0.0)  # whose routing depends on the rest of a batch
METHODS = [Shift(), ByPrompt(), Prefix(), BALANCED, make_method("rewiring"), None]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_results_do_not_depend_on_batch_size_and_order(folder, model, tokenizer, method):
    requests = requests_of(folder)
    one_by_one = MethodLM(model, tokenizer, method, batch_size=1).loglikelihood(requests)
    numbers = list(range(len(requests)))
    random.Random(0).shuffle(numbers)
    shuffled = MethodLM(model, tokenizer, method, batch_size=5).loglikelihood([requests[i] for i in numbers])
    torch.testing.assert_close(values(shuffled), values(one_by_one)[numbers], atol=2e-5, rtol=0)


def test_a_method_is_in_force_while_it_answers_and_never_after(folder, model, tokenizer):
    requests = requests_of(folder)
    plain = MethodLM(model, tokenizer, batch_size=4).loglikelihood(requests)
    shifted = MethodLM(model, tokenizer, Shift(), batch_size=4).loglikelihood(requests)
    with Shift().apply(model):
        expected = harness(model, tokenizer, 4).loglikelihood(requests, disable_tqdm=True)
    torch.testing.assert_close(values(shifted), values(expected), atol=2e-5, rtol=0)
    assert (values(shifted) - values(plain)).abs().max() > 1e-3
    assert MethodLM(model, tokenizer, batch_size=4).loglikelihood(requests) == plain
    assert not any(isinstance(h, RoutingHooks) for m in model.modules() for h in m._forward_pre_hooks.values())


def test_a_method_by_item_gets_the_prompt_as_the_harness_encodes_it(folder, model, tokenizer):
    requests = requests_of(folder, limit=3)
    method = ByPrompt()
    found = MethodLM(model, tokenizer, method, batch_size=4).loglikelihood(requests)
    assert {p.tokens for p in method.prompts} == {tuple(tokenizer.encode(request.args[0])) for request in requests}
    assert len({p.id for p in method.prompts}) == 3
    for item in range(3):
        own = [i for i, request in enumerate(requests) if request.doc_id == item]
        amount = method.amount * (len(tokenizer.encode(requests[own[0]].args[0])) % 5)
        with Shift(amount).apply(model):
            expected = harness(model, tokenizer).loglikelihood([requests[i] for i in own], disable_tqdm=True)
        torch.testing.assert_close(values([found[i] for i in own]), values(expected), atol=2e-5, rtol=0)


def test_what_is_put_before_a_prompt_is_read_and_not_scored(folder, model, tokenizer):
    requests = requests_of(folder, limit=3)
    record = Record()
    found = MethodLM(model, tokenizer, Prefix(), record=record).loglikelihood(requests)
    pairs = [(tokenizer.encode(r.args[0]), tokenizer.encode(r.args[1])) for r in requests]
    longer = [(("", ""), [65, 66, 67, 68, 69] + context, choice) for context, choice in pairs]
    expected = harness(model, tokenizer)._loglikelihood_tokens(longer, disable_tqdm=True)
    torch.testing.assert_close(values(found), values(expected), atol=2e-5, rtol=0)


def test_a_prompt_that_is_too_long_is_cut_in_front_for_every_choice_alike(folder, tokenizer):
    model = tiny_model("olmoe", vocab_size=260, max_position_embeddings=40)
    requests = requests_of(folder, limit=2)
    method = ByPrompt()
    MethodLM(model, tokenizer, method).loglikelihood(requests)
    longest = max(len(tokenizer.encode(r.args[1])) for r in requests if r.doc_id == 0)
    prompt = next(p for p in method.prompts if p.id.endswith("/0"))
    assert len(prompt.tokens) == 41 - longest
    assert prompt.tokens == tuple(tokenizer.encode(requests[0].args[0])[-len(prompt.tokens) :])
    cut = MethodLM(model, tokenizer, Prefix(count=90)).loglikelihood(requests)
    assert torch.isfinite(values(cut)).all()


@pytest.mark.parametrize("method", [None, Shift(), ByPrompt(), Prefix()], ids=lambda m: type(m).__name__)
def test_texts_are_generated_with_the_method(folder, model, tokenizer, method):
    requests = requests_of(folder, "writing", limit=3)
    found = MethodLM(model, tokenizer, method, batch_size=2).generate_until(requests)
    for request, text in zip(requests, found):
        ids = tokenizer.encode(request.args[0])
        shift = 0.0 if method is None or isinstance(method, Prefix) else method.amount
        shift *= len(ids) % 5 if isinstance(method, ByPrompt) else 1
        before = [65, 66, 67, 68, 69] if isinstance(method, Prefix) else []
        with Shift(shift).apply(model):
            new = model.generate(torch.tensor([before + ids]), max_new_tokens=8, do_sample=False, pad_token_id=256)
        expected = tokenizer.decode(new[0, len(before + ids) :], skip_special_tokens=True).split("\n")[0]
        assert text == expected


def test_whole_texts_are_scored_but_not_by_methods_that_need_a_prompt(folder, model, tokenizer):
    requests = requests_of(folder, "text", limit=3)
    expected = harness(model, tokenizer).loglikelihood_rolling(requests, disable_tqdm=True)
    assert MethodLM(model, tokenizer, batch_size=1).loglikelihood_rolling(requests) == pytest.approx(
        expected, abs=1e-4
    )
    with pytest.raises(ValueError, match="ByPrompt adapts the model to a prompt, and a text .* has none"):
        MethodLM(model, tokenizer, ByPrompt()).loglikelihood_rolling(requests)


def test_what_is_on_record_is_not_computed_again(folder, model, tokenizer, tmp_path):
    requests = requests_of(folder)
    first = MethodLM(model, tokenizer, Shift(), record=Record(tmp_path / "a.jsonl", "x")).loglikelihood(requests)
    with counted(model) as passes:
        again = MethodLM(model, tokenizer, Shift(), record=Record(tmp_path / "a.jsonl", "x")).loglikelihood(requests)
    assert again == first and passes.forward == 0
    with counted(model) as passes:  # of another method, or other references
        MethodLM(model, tokenizer, Shift(), record=Record(tmp_path / "a.jsonl", "y")).loglikelihood(requests)
    assert passes.forward == len(requests)


def test_passes_and_seconds_are_on_record(folder, model, tokenizer):
    requests = requests_of(folder)
    record = Record()
    lm = MethodLM(model, tokenizer, Shift(), record=record, batch_size=2, timed=True)
    lm.loglikelihood(requests)
    spent = [record[key].spent for key in record.keys()]
    assert sum(one.forward for one in spent) == pytest.approx(len(requests))
    assert all(one.seconds > 0 and one.backward == 0 for one in spent)
    timed = [one for one in spent if one.frozen_seconds is not None]
    assert 0 < len(timed) <= len(requests) and all(one.frozen_seconds > 0 for one in timed)


@pytest.mark.parametrize("method", [Shift(), ByPrompt()], ids=lambda m: type(m).__name__)
def test_a_text_that_is_drawn_hangs_on_its_request_and_the_seed_alone(folder, model, tokenizer, method):
    """Not on the batch, the order, other random numbers, or what is on record; repetitions are drawn anew."""
    requests = requests_of(folder, "writing", limit=3)
    for request in requests:
        request.arguments = (request.args[0], request.args[1] | {"do_sample": True, "temperature": 1.0})
    twice = [request for request in requests for _ in range(2)]
    state = torch.random.get_rng_state()
    texts = MethodLM(model, tokenizer, method, batch_size=1).generate_until(twice)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(set(texts)) == 6
    torch.rand(1)
    record = Record()
    lm = MethodLM(model, tokenizer, method, record=record, batch_size=2, timed=True)
    assert lm.generate_until(twice[4:]) + lm.generate_until(twice[2:4]) + lm.generate_until(twice[:2]) == [
        *texts[4:],
        *texts[2:4],
        *texts[:2],
    ]
    other = MethodLM(model, tokenizer, method, batch_size=3, seed=1).generate_until(twice)
    assert all(one != another for one, another in zip(other, texts))


def test_whether_a_text_is_drawn_is_decided_as_the_harness_decides_it(folder):
    (request,) = requests_of(folder, "writing", limit=1)
    drawn = [{"do_sample": True}, {"temperature": 0.7}, {"temperature": 0.7, "do_sample": None}]
    for how in drawn + [{}, {"temperature": 0.0}, {"temperature": 0.7, "do_sample": False}]:
        request.arguments = (request.args[0], how)
        assert is_drawn(request) == (how in drawn)
    assert not is_drawn(requests_of(folder, limit=1)[0])
