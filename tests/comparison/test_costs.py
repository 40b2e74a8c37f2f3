"""Passes of a model are counted, whoever runs them."""

import torch

from knnmoe_hf.comparison.costs import counted
from tests.conftest import tiny_model


def test_forward_and_backward_passes_are_examples_times_passes(tokens):
    model = tiny_model("olmoe")
    with counted(model) as passes:
        with torch.no_grad():
            model(input_ids=tokens)
            model.model(tokens[:2])
            model(inputs_embeds=model.get_input_embeddings()(tokens[:1]))
        model(input_ids=tokens).logits.sum().backward()
        loss = model(input_ids=tokens, labels=tokens).loss
    assert (passes.forward, passes.backward, passes.tokens) == (3 + 2 + 1 + 3 + 3, 3, 12 * 12)
    assert passes.seconds > 0
    loss.backward()
    model(input_ids=tokens)
    assert (passes.forward, passes.backward) == (12, 3)  # what comes later does not count
    assert not model.model._forward_hooks and not model.model._forward_pre_hooks


def test_decoding_counts_a_pass_for_each_token(tokens):
    model = tiny_model("olmoe")
    with counted(model) as passes:
        model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert passes.forward == 3 * 4 and passes.tokens == 3 * (12 + 3)


def test_hooks_are_gone_after_an_error(tokens):
    model = tiny_model("olmoe")
    try:
        with counted(model):
            model(input_ids=tokens.float())
    except Exception:
        pass
    assert not model.model._forward_hooks
