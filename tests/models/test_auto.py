"""Loading a memory's folder or repository with the auto classes gives its base model with the memory attached."""

import shutil
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from knnmoe_hf import KNNMoEConfig, KNNMoEForCausalLM, RoutingMemory, active_memory, detach_memory, disable_memory
from knnmoe_hf.errors import MemoryFileError, MemoryMismatchError
from knnmoe_hf.models.attach import get_memory
from tests.conftest import random_memory, tiny_model

CLASSES = {"olmoe": "OlmoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM"}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<pad>", *(f"w{number}" for number in range(94))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>")


def logits_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def save_base(folder, family: str = "olmoe", seed: int = 0) -> str:
    tiny_model(family, seed=seed).save_pretrained(folder)
    return str(folder)


def save_memory(folder, base: str, revision: str | None = None, **hub) -> str:
    memory = random_memory(AutoModelForCausalLM.from_pretrained(base, revision=revision, **hub))
    memory.config.base_model_revision = revision
    replace(memory, tokenizer=tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base(tmp_path) -> str:
    return save_base(tmp_path / "base")


@pytest.fixture
def saved(tmp_path, base) -> str:
    return save_memory(tmp_path / "memory", base)


def test_a_memory_loads_as_its_base_models_own_class_with_the_memory_in_force(family, tmp_path, tokens):
    base = save_base(tmp_path / "base", family)
    saved = save_memory(tmp_path / "memory", base)
    plain, model = AutoModelForCausalLM.from_pretrained(base), AutoModelForCausalLM.from_pretrained(saved)
    assert type(model) is type(plain) and type(model).__name__ == CLASSES[family]
    assert active_memory(model) == "default"
    assert model.config.to_dict() == plain.config.to_dict()
    assert model.generation_config.to_dict() == plain.generation_config.to_dict()
    assert not torch.equal(logits_of(model, tokens), logits_of(plain, tokens))
    with disable_memory(model):
        assert torch.equal(logits_of(model, tokens), logits_of(plain, tokens))


HANDED_ON = {
    "dtype": (dict(dtype=torch.bfloat16), lambda m: {p.dtype for p in m.parameters()}),
    "dtype by name": (dict(dtype="float16"), lambda m: {p.dtype for p in m.parameters()}),
    "device_map cpu": (dict(device_map="cpu"), lambda m: (getattr(m, "hf_device_map", None), m.device)),
    "device_map auto": (dict(device_map="auto"), lambda m: (getattr(m, "hf_device_map", None), m.device)),
    "attention": (dict(attn_implementation="eager"), lambda m: m.config._attn_implementation),
    "experts eager": (dict(experts_implementation="eager"), lambda m: m.config._experts_implementation),
    "experts batched": (dict(experts_implementation="batched_mm"), lambda m: m.config._experts_implementation),
    "output_attentions": (
        dict(output_attentions=True, attn_implementation="eager"),
        lambda m: (m.config.output_attentions, len(m(input_ids=torch.arange(4)[None]).attentions)),
    ),
    "output_hidden_states": (
        dict(output_hidden_states=True),
        lambda m: (m.config.output_hidden_states, len(m(input_ids=torch.arange(4)[None]).hidden_states)),
    ),
    "output_router_logits": (
        dict(output_router_logits=True),
        lambda m: len(m(input_ids=torch.arange(4)[None]).router_logits),
    ),
    "rope_theta and other options": (dict(rms_norm_eps=0.5), lambda m: m.config.rms_norm_eps),
    "low memory and format": (dict(use_safetensors=True), lambda m: type(m)),
}


@pytest.mark.parametrize("name", HANDED_ON)
def test_every_argument_has_the_same_effect_as_for_the_base_model(name, base, saved):
    options, seen = HANDED_ON[name]
    plain, untouched = (
        AutoModelForCausalLM.from_pretrained(base, **options),
        AutoModelForCausalLM.from_pretrained(base),
    )
    model = AutoModelForCausalLM.from_pretrained(saved, **options)
    assert active_memory(model) == "default"
    assert seen(model) == seen(plain)
    if "device_map" not in options and "use_safetensors" not in options:
        with disable_memory(model):
            outcome = _try(seen, untouched)
        assert outcome != seen(plain)  # the argument has an effect
    other = KNNMoEForCausalLM.from_pretrained(base, memory=saved, **options)
    assert seen(other) == seen(plain)


def _try(seen, model):
    try:
        return seen(model)
    except TypeError:  # outputs that were not requested are None
        return None


def test_output_attentions_without_eager_attention_fails_or_not_as_it_does_for_the_base_model(base, saved):
    outcomes = []
    for place in (base, saved):
        try:
            outcomes.append(AutoModelForCausalLM.from_pretrained(place, output_attentions=True).config.to_dict())
        except Exception as error:
            outcomes.append(repr(error))
    assert outcomes[0] == outcomes[1]


def test_output_loading_info_returns_a_pair(saved):
    model, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert active_memory(model) == "default" and not info["missing_keys"]


def test_options_of_the_memory_can_be_changed_while_loading(base, saved):
    for model in (
        AutoModelForCausalLM.from_pretrained(saved, num_neighbors=2),
        KNNMoEForCausalLM.from_pretrained(saved, num_neighbors=2),
        KNNMoEForCausalLM.from_pretrained(base, memory=saved, num_neighbors=2),
        AutoModelForCausalLM.from_pretrained(saved, config=AutoConfig.from_pretrained(saved, num_neighbors=2)),
    ):
        assert get_memory(model).config.num_neighbors == 2
        assert get_memory(model).config.gamma == 0.3  # as it was saved
    with pytest.raises(ValueError, match="num_neighbors=0"):
        AutoModelForCausalLM.from_pretrained(saved, num_neighbors=0)


def test_another_value_space_than_the_saved_one_is_refused(saved):
    with pytest.raises(MemoryMismatchError, match="built with value_space='logits'"):
        AutoModelForCausalLM.from_pretrained(saved, value_space="delta")


def test_a_base_model_loads_with_a_memory_by_path_or_object_under_a_name(base, saved, tokens):
    memory = RoutingMemory.from_pretrained(saved)
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(saved), tokens)
    for given in (saved, memory):
        model = KNNMoEForCausalLM.from_pretrained(base, memory=given, memory_name="medicine")
        assert active_memory(model) == "medicine"
        assert torch.equal(logits_of(model, tokens), wanted)
    assert get_memory(model) is memory
    with pytest.raises(MemoryFileError, match="model_type 'olmoe'"):
        KNNMoEForCausalLM.from_pretrained(base)
    with pytest.raises(TypeError, match="KNNMoEForCausalLM.from_pretrained"):
        KNNMoEForCausalLM(KNNMoEConfig())


def test_a_pipeline_generates_from_a_memorys_folder_alone(saved):
    generator = pipeline("text-generation", model=saved)
    assert active_memory(generator.model) == "default"
    options = dict(max_new_tokens=6, do_sample=False)
    found = generator("w1 w2 w3", return_tensors=True, **options)[0]["generated_token_ids"]
    ids = generator.tokenizer("w1 w2 w3", return_tensors="pt")
    assert ids.input_ids.tolist() == [[3, 4, 5]]
    assert found == generator.model.generate(**ids, pad_token_id=1, **options)[0].tolist()
    with disable_memory(generator.model):
        assert generator("w1 w2 w3", return_tensors=True, **options)[0]["generated_token_ids"] != found


def test_saving_the_loaded_model_gives_the_plain_base_model(base, saved, tmp_path, tokens):
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert active_memory(again) is None and type(again) is type(plain)
    assert torch.equal(logits_of(again, tokens), logits_of(plain, tokens))
    files = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("again", "base")]
    assert files[0] == files[1]


def test_a_base_model_that_has_moved_is_loaded_from_base_model_name_or_path(base, saved, tmp_path, tokens):
    wanted = logits_of(AutoModelForCausalLM.from_pretrained(saved), tokens)
    moved = shutil.move(base, tmp_path / "moved")
    for load in (AutoModelForCausalLM, KNNMoEForCausalLM):
        with pytest.raises(OSError, match="base_model_name_or_path=") as error:
            load.from_pretrained(saved)
        assert base[:40] in str(error.value)
        model = load.from_pretrained(saved, base_model_name_or_path=str(moved))
        assert torch.equal(logits_of(model, tokens), wanted)
    with pytest.raises(MemoryMismatchError, match="not those that this memory was built for"):
        other = save_base(tmp_path / "other", seed=9)
        AutoModelForCausalLM.from_pretrained(saved, base_model_name_or_path=other)


def test_a_memory_without_base_model_name_is_refused_with_the_way_out(tmp_path):
    random_memory(tiny_model("olmoe")).save_pretrained(tmp_path / "memory")
    for load in (AutoModelForCausalLM, KNNMoEForCausalLM):
        with pytest.raises(ValueError, match="pass base_model_name_or_path"):
            load.from_pretrained(tmp_path / "memory")


def publish(cache, repo: str, commit: str, branch: str, write) -> None:
    """Writes a repository into a cache of the Hub, as downloading it would."""
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / branch).write_text(commit)
    (place / "snapshots" / commit).mkdir(parents=True)
    write(place / "snapshots" / commit)


def test_revision_selects_the_memory_and_the_base_model_is_loaded_at_its_recorded_revision(tmp_path, tokens):
    old, new = "a" * 40, "b" * 40
    hub = dict(cache_dir=tmp_path, local_files_only=True)
    publish(tmp_path, "me/base", old, "main", lambda folder: save_base(folder, seed=0))
    publish(tmp_path, "me/memory", "c" * 40, "v1", lambda folder: save_memory(folder, "me/base", old, **hub))
    publish(tmp_path, "me/base", new, "main", lambda folder: save_base(folder, seed=1))
    publish(tmp_path, "me/memory", "d" * 40, "main", lambda folder: save_memory(folder / "sub", "me/base", new, **hub))
    places = {old: dict(revision="v1"), new: dict(subfolder="sub")}
    for commit, place in places.items():
        for load in (AutoModelForCausalLM, KNNMoEForCausalLM):
            model = load.from_pretrained("me/memory", **place, **hub)
            assert get_memory(model).config.base_model_revision == commit
            detach_memory(model)
            plain = AutoModelForCausalLM.from_pretrained("me/base", revision=commit, **hub)
            assert torch.equal(logits_of(model, tokens), logits_of(plain, tokens))
    memory = RoutingMemory.from_pretrained("me/memory", revision="v1", **hub)
    KNNMoEForCausalLM.from_pretrained("me/base", memory=memory, revision=old, **hub)
    with pytest.raises(MemoryMismatchError, match="not those that this memory was built for"):
        KNNMoEForCausalLM.from_pretrained("me/base", memory=memory, **hub)  # main has moved on
