"""Output embeddings that run where no forward of their model does, or that give other numbers than when attaching."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel
from transformers.modeling_layers import MtpModel

from knnmoe_hf import attach_memory, detach_memory, disable_memory, get_memory
from knnmoe_hf.errors import UnsupportedModelError
from tests.models.recalling import MIXED
from tests.models.test_interrupted import raise_
from tests.support.caches import close, uncached
from tests.support.families import family_model
from tests.support.models import random_memory, tiny_model

OUTSIDE = "ran outside of a forward of their model"


def recalling(model):
    attach_memory(model, random_memory(model, **MIXED))
    return model


# numbers of other tokens


def larger(model):
    model.resize_token_embeddings(128)


def smaller(model):
    model.resize_token_embeddings(91)


def larger_in_place(model):
    model.lm_head.weight = torch.nn.Parameter(torch.randn(128, 32))


@pytest.mark.parametrize("is_tied, change", [(True, larger), (True, smaller), (False, larger_in_place)])
def test_output_embeddings_of_another_vocabulary_are_refused_though_they_are_the_same_module(is_tied, change, tokens):
    model = recalling(tiny_model("olmoe", tie_word_embeddings=is_tied))
    head, memory = model.get_output_embeddings(), get_memory(model)
    change(model)
    assert model.get_output_embeddings() is head
    with pytest.raises(UnsupportedModelError, match=r"return \d+ numbers for each token, where they returned 96 .*"):
        uncached(model, tokens.clamp(max=90))
    with disable_memory(model):
        own = uncached(model, tokens.clamp(max=90))
    if change is smaller:
        return
    detach_memory(model)
    attach_memory(model, memory)
    mixed = uncached(model, tokens.clamp(max=90))
    assert mixed.shape == own.shape and (mixed - own).abs().max() > 1


# outside of any forward


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["model.layers.1", "model.norm", "lm_head"])
def test_nothing_of_a_forward_that_was_interrupted_meets_output_embeddings_that_run_alone(place, error, tokens):
    model = recalling(tiny_model("olmoe"))
    mixed, hidden = uncached(model, tokens), torch.randn(*tokens.shape, 32)
    handle = model.get_submodule(place).register_forward_pre_hook(lambda *_: raise_(error))
    with pytest.raises(error):
        uncached(model, tokens)
    handle.remove()
    with torch.no_grad():
        with pytest.raises(UnsupportedModelError, match=OUTSIDE):
            model.lm_head(hidden)
        with pytest.raises(UnsupportedModelError, match=OUTSIDE):
            model.forward(tokens)
        with disable_memory(model):
            assert torch.equal(model.lm_head(hidden), hidden @ model.lm_head.weight.T)
    assert torch.equal(uncached(model, tokens), mixed)


# copied without their model


def test_output_embeddings_that_an_adapter_has_copied_are_refused_until_the_memory_is_attached_again(tokens):
    model = tiny_model("olmoe")
    base, memory = uncached(model, tokens), random_memory(model, **MIXED)
    attach_memory(model, memory)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(UnsupportedModelError, match="has other output embeddings than .*: detach it, and"):
        uncached(adapted, tokens)
    detach_memory(adapted)
    assert torch.equal(uncached(adapted, tokens), base)
    attach_memory(adapted, memory)
    mixed = uncached(adapted, tokens)
    with adapted.disable_adapter():
        close(uncached(adapted, tokens), mixed)
    assert (mixed - base).abs().max() > 1


def test_output_embeddings_copied_alone_have_no_memory_and_those_of_a_copied_model_have_its_own(tokens):
    model = recalling(tiny_model("olmoe"))
    mixed, hidden = uncached(model, tokens), torch.randn(*tokens.shape, 32)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model.lm_head)(hidden), hidden @ model.lm_head.weight.T)
    twin = copy.deepcopy(model)
    detach_memory(model)
    assert torch.equal(uncached(twin, tokens), mixed)
    with pytest.raises(UnsupportedModelError, match=OUTSIDE):
        twin.lm_head(hidden)


# candidates for assisted generation


def with_layers_for_more_tokens(monkeypatch):
    """A model with two layers that each predict a token further on; their weights are random, not read from a file."""

    def make(cls, main_model, **_):
        torch.manual_seed(1)
        made = cls(main_model, main_model.config.num_mtp_layers).eval()
        for parameter in made.layers.parameters():
            torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
        return made

    monkeypatch.setattr(MtpModel, "from_pretrained", classmethod(make))
    model = family_model("glm4_moe")
    model.config.num_mtp_layers = 2
    return model, dict(use_mtp=True)


def with_a_model_that_shares_the_output_embeddings(monkeypatch):
    model, assistant = tiny_model("olmoe"), tiny_model("olmoe", seed=3)
    assistant.lm_head = model.lm_head
    return model, dict(assistant_model=assistant)


def with_a_model_of_hidden_states_alone(monkeypatch):
    model, places = tiny_model("olmoe"), dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    shape = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
    more = dict(num_key_value_heads=2, block_size=3, mask_token_id=95, target_layer_ids=[0], layer_types=None)
    assistant = MuseGlimmerAssistantModel(MuseGlimmerAssistantConfig(**places, **shape, **more)).eval()
    return model, dict(assistant_model=assistant, speculation_type="dflash")


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        with_layers_for_more_tokens,
        with_a_model_that_shares_the_output_embeddings,
        with_a_model_of_hidden_states_alone,
    ],
)
def test_candidates_of_the_model_s_own_output_embeddings_are_kept_as_the_mixed_logits_say(
    make, do_sample, tokens, monkeypatch
):
    model, ways = make(monkeypatch)
    recalling(model)
    prompt = tokens[:1, :6]
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=8, pad_token_id=0, output_logits=True)
    found = model.generate(prompt, do_sample=do_sample, return_dict_in_generate=True, **options, **ways)
    close(torch.cat(found.logits), uncached(model, found.sequences[:, :-1])[0, 5:])
    if not do_sample:
        assert torch.equal(found.sequences, model.generate(prompt, do_sample=False, **options))
    with pytest.raises(UnsupportedModelError, match=OUTSIDE):
        model.get_output_embeddings()(torch.zeros(1, 1, 32))
