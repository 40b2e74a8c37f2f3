"""Trained prefixes of PEFT, which fill a cache before the model's call: they are no part of a token's past."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import CartridgeConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional as F

from knnmoe_hf import disable_memory
from tests.models.test_kv_state import assert_refused
from tests.support.caches import WIDE, padded, running_mean_by_hand
from tests.support.models import tiny_model
from tests.support.running_means import HALF_LIFE, put_on

PREFIX = 3


def prefixed(family, before, kind=PrefixTuningConfig):
    """A PEFT model with a trained prefix, whose base was given overrides before or after it was wrapped."""
    base = tiny_model(family, **WIDE[family])
    overrides = put_on(base) if before else None
    options = dict(num_virtual_tokens=PREFIX, task_type="CAUSAL_LM")
    model = get_peft_model(base, kind(**options))
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    model.eval()
    return model, overrides or put_on(model)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", [PrefixTuningConfig, CartridgeConfig])
def test_running_means_begin_with_the_first_token_of_the_text(family, tokens, before, kind):
    model, overrides = prefixed(family, before, kind)
    ids, mask = padded(tokens, "right")
    seen = overrides[1]
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask)
    values, means = seen.values[-1].view(3, 12), seen.means[-1].view(3, 12)
    real = mask.bool()
    wanted = running_mean_by_hand(values, real, torch.zeros_like(real), HALF_LIFE)
    torch.testing.assert_close(means.double()[real], wanted[real], atol=1e-5, rtol=0)
    # the cache that it returns holds the prefix, and goes on
    cache = out.past_key_values
    assert cache.get_seq_length() == PREFIX + 12
    with torch.no_grad():
        longer = F.pad(mask, (PREFIX, 2), value=1)
        model.base_model(input_ids=tokens[:, :2], attention_mask=longer, past_key_values=cache)
    values, real = torch.cat([values, seen.values[-1].view(3, 2)], 1), longer[:, PREFIX:].bool()
    wanted = running_mean_by_hand(values, real, torch.zeros_like(real), HALF_LIFE)
    torch.testing.assert_close(seen.means[-1].view(3, 2).double(), wanted[:, 12:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("options", [dict(do_sample=False), dict(num_return_sequences=2, do_sample=True)], ids=str)
def test_generated_tokens_go_on_from_the_text_behind_a_prefix(family, tokens, before, options):
    model, overrides = prefixed(family, before)
    ids, mask = padded(tokens, "left")
    seen = overrides[1]
    model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, **options)
    values, means = (torch.cat([part.view(-1, 12 if len(part) > 6 else 1) for part in parts], 1)
                     for parts in (seen.values, seen.means))  # fmt: skip
    real = F.pad(mask.repeat_interleave(len(values) // 3, 0), (0, 5), value=1).bool()
    assert values.shape == real.shape
    wanted = running_mean_by_hand(values, real, torch.zeros_like(real), HALF_LIFE)
    torch.testing.assert_close(means.double()[real], wanted[real], atol=1e-5, rtol=0)


def test_beams_behind_a_prefix_are_those_of_each_sequence_alone(tokens):
    model, _ = prefixed("olmoe", before=True)
    options = dict(max_new_tokens=6, pad_token_id=0, num_beams=3, do_sample=False)
    together = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
    for row in range(3):
        alone = tokens[row : row + 1]
        found = model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(found[0], together[row])


def test_a_prompt_in_place_of_a_prefix_is_part_of_the_text(tokens):
    model = get_peft_model(tiny_model("olmoe"), PromptTuningConfig(num_virtual_tokens=PREFIX, task_type="CAUSAL_LM"))
    seen = put_on(model)[1]
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    assert seen.means[-1].numel() == 3 * (12 + PREFIX)


def test_a_cache_of_a_prefix_that_the_caller_asked_for_is_taken_for_one(tokens):
    model, overrides = prefixed("olmoe", before=True)
    with torch.no_grad():
        cache = copy.deepcopy(model.get_prompt(batch_size=3))
        model.get_base_model()(input_ids=tokens, past_key_values=cache)
    seen = overrides[1]
    everything = torch.ones(3, 12, dtype=torch.bool)
    wanted = running_mean_by_hand(seen.values[-1].view(3, 12), everything, ~everything, HALF_LIFE)
    torch.testing.assert_close(seen.means[-1].view(3, 12).double(), wanted, atol=1e-5, rtol=0)
    with disable_memory(model), torch.no_grad():  # what follows a prefix must still be known
        cache = model.get_prompt(batch_size=3)
        model.get_base_model()(input_ids=tokens[:, :1], past_key_values=cache)
    assert_refused(model.get_base_model(), cache, tokens, "tokens were added to it without the memory in force")
    cache = model.get_prompt(batch_size=3)
    tiny_model("olmoe")(input_ids=tokens[:, :1], past_key_values=cache)
    assert_refused(model.get_base_model(), cache, tokens, "other code filled it")


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_finds_its_prefix(tokens, before, whole):
    model, _ = prefixed("olmoe", before)
    model.get_base_model().set_experts_implementation("batched_mm")
    torch.compiler.reset()
    call = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    with torch.no_grad():
        wanted = model(**call).logits
        if whole:
            found = torch.compile(model, backend="eager")(**call).logits
        else:
            model.get_base_model().compile(backend="eager")
            found = model(**call).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


PEFT_AFTER_ATTACHING = """
import sys, torch
from tests.support.running_means import put_on
from tests.support.models import tiny_model
base = tiny_model("olmoe")
assert "peft" not in sys.modules
seen = put_on(base)[1]
from peft import PrefixTuningConfig, get_peft_model
model = get_peft_model(base, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
for _ in range(2):
    model(input_ids=torch.arange(4)[None])
    assert seen.means[-1][0].item() == seen.values[-1][0].item()
"""


@pytest.mark.slow
def test_a_prefix_is_found_where_peft_is_imported_after_attaching():
    done = subprocess.run([sys.executable, "-c", PEFT_AFTER_ATTACHING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
