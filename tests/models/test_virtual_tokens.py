"""Trained prefixes of PEFT, which fill a cache before the model's call: they are no part of a token's past."""

import pytest
import torch
from peft import CartridgeConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional as F

from tests.models.test_kv_state import assert_refused
from tests.support.caches import WIDE, close, padded, running_mean_by_hand
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
@pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(num_return_sequences=2, do_sample=True)], ids=str)
def test_generation_with_a_prefix_equals_passes_over_the_whole_text(family, tokens, before, options):
    model, _ = prefixed(family, before)
    ids, mask = padded(tokens, "left")
    same = dict(max_new_tokens=6, pad_token_id=0, output_logits=True, return_dict_in_generate=True)
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=mask, **(dict(do_sample=False) | same | options))
        if "num_beams" in options:  # whose logits are those of beams that were given up
            alone = model.generate(input_ids=tokens[:1], attention_mask=torch.ones(1, 12), **(same | options))
            assert torch.equal(out.sequences[0], alone.sequences[0])
            return
        many = F.pad(mask.repeat_interleave(len(out.sequences) // 3, 0), (0, 6), value=1)
        whole = model(input_ids=out.sequences, attention_mask=many).logits
    close(torch.stack(out.logits, 1), whole[:, 11:-1], atol=2e-4)


def test_a_prompt_in_place_of_a_prefix_is_part_of_the_text(tokens):
    model = get_peft_model(tiny_model("olmoe"), PromptTuningConfig(num_virtual_tokens=PREFIX, task_type="CAUSAL_LM"))
    seen = put_on(model)[1]
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    assert seen.means[-1].numel() == 3 * (12 + PREFIX)


def test_a_cache_of_a_prefix_that_the_caller_filled_itself_is_refused(tokens):
    model, _ = prefixed("olmoe", before=True)
    cache = model.get_prompt(batch_size=3)
    assert_refused(model.get_base_model(), cache, tokens, "other code filled it")
