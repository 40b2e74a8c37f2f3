"""In which dtype commands load a model, on simulated processors with and without fast half precision."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, OlmoeForCausalLM

from knnmoe_hf import RoutingMemory
from knnmoe_hf.cli import loading, main
from knnmoe_hf.models import precision
from knnmoe_hf.models.attach import active_memory
from tests.cli.helpers import HELD_OUT, QUICK, TEXTS, one_error, texts, write_rows
from tests.support.models import random_memory

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def processor(monkeypatch):
    """Simulates a CPU with these capabilities."""

    def simulate(*names: str) -> None:
        monkeypatch.setattr(precision, "_cpu_capabilities", lambda: dict.fromkeys(names, True))
        monkeypatch.setattr(precision, "_onednn_supports", lambda dtype: True)

    return simulate


@pytest.fixture(scope="module")
def bases(base, tmp_path_factory) -> dict[torch.dtype, Path]:
    """The tiny model saved in each dtype, by dtype."""
    folders = {FP32: base}
    for dtype in (BF16, FP16):
        folders[dtype] = tmp_path_factory.mktemp("bases") / "base"
        shutil.copytree(base, folders[dtype])
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(folders[dtype])
    return folders


@pytest.fixture(scope="module")
def memory(bases, tmp_path_factory) -> Path:
    """A memory whose base model is saved in bfloat16."""
    folder = tmp_path_factory.mktemp("memory")
    random_memory(AutoModelForCausalLM.from_pretrained(bases[BF16], dtype=FP32)).save_pretrained(folder)
    return folder


def asking(model: Path | None, dtype: str | None = None, device_map: str | None = None) -> Namespace:
    name = None if model is None else str(model)
    return Namespace(model=name, base_model_revision=None, dtype=dtype, device_map=device_map, quiet=False)


def load(folder: Path, **options):
    return loading.load_base(asking(folder, **options))


def load_memory(folder: Path, model: Path | None = None):
    return loading.load_with_memory(RoutingMemory.from_pretrained(folder), asking(model))


def said(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("knnmoe: loading ")]


@pytest.mark.parametrize(
    "saved, capabilities, expected",
    [
        (BF16, ["avx2", "avx512_f"], FP32),
        (BF16, ["avx512_bf16"], BF16),
        (BF16, ["neon", "bf16"], BF16),
        (FP16, ["avx512_bf16"], FP32),
        (FP16, ["neon", "fp16_arith"], FP16),
        (FP32, ["avx2"], FP32),
    ],
)
def test_a_model_is_loaded_as_saved_but_in_float32_where_that_is_slow(
    saved, capabilities, expected, bases, processor, capsys
):
    processor(*capabilities)
    assert load(bases[saved]).dtype == expected
    name = str(saved).removeprefix("torch.")
    lines = said(capsys)
    assert len(lines) == (saved != expected)
    assert all(f"{bases[saved]} in float32" in line and f"--dtype {name}" in line for line in lines)


@pytest.mark.parametrize(
    "asked, expected", [({"dtype": "auto"}, BF16), ({"dtype": "float16"}, FP16), ({"device_map": "cpu"}, BF16)]
)
def test_what_is_asked_for_is_left_alone(asked, expected, bases, processor, capsys):
    processor("avx2")
    assert load(bases[BF16], **asked).dtype == expected
    assert not said(capsys)


def test_a_model_for_another_device_is_left_alone(bases, processor, capsys, monkeypatch):
    processor("avx2")
    asked = {}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, **kwargs: asked.update(kwargs) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loading.load_base(asking(bases[BF16]), torch.device("cuda", 0))
    assert asked == {"dtype": "auto", "device_map": {"": "cuda:0"}} and not said(capsys)


def test_the_dtype_of_the_weights_counts_where_the_configuration_has_none(bases, processor, capsys, tmp_path):
    processor("avx2")
    shutil.copytree(bases[BF16], tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert load(tmp_path / "base").dtype == FP32 and len(said(capsys)) == 1


def test_an_adapters_base_model_decides(bases, processor, capsys, tmp_path):
    processor("avx2")
    model = AutoModelForCausalLM.from_pretrained(bases[BF16], dtype=FP32)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path)
    assert loading.saved_dtype(str(tmp_path)) == BF16


def test_a_memorys_base_model_decides(memory, processor, capsys):
    processor("avx2")
    assert load_memory(memory).dtype == FP32 and len(said(capsys)) == 1
    processor("avx512_bf16")
    assert load_memory(memory).dtype == BF16 and not said(capsys)


def test_a_base_model_that_has_moved_is_named(bases, memory, processor, tmp_path, capsys):
    processor("avx2")
    shutil.copytree(bases[BF16], tmp_path / "moved")
    model = load_memory(memory, tmp_path / "moved")
    assert model.config.name_or_path == str(tmp_path / "moved") and active_memory(model) == "default"
    with pytest.raises(ValueError, match="gates of this OlmoeForCausalLM are not those"):
        other = AutoModelForCausalLM.from_pretrained(bases[FP32])
        for layer in other.model.layers:
            layer.mlp.gate.weight.data.add_(1)
        other.save_pretrained(tmp_path / "other")
        load_memory(memory, tmp_path / "other")


def test_what_cannot_be_loaded_is_said_by_loading_it(memory, processor, capsys, tmp_path):
    processor("avx2")
    assert loading.saved_dtype(str(tmp_path / "nothing")) is None
    shutil.copytree(memory, tmp_path / "memory")
    config = json.loads((tmp_path / "memory" / "config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "moved")
    (tmp_path / "memory" / "config.json").write_text(json.dumps(config))
    dataset = texts(tmp_path / "test.jsonl", HELD_OUT)
    assert main(["evaluate", str(tmp_path / "memory"), "--dataset", dataset]) == 1
    assert "if it is elsewhere, name it with --model" in one_error(capsys.readouterr(), "evaluate")


@pytest.mark.parametrize("command", ["build", "quickstart", "evaluate"])
def test_every_command_chooses_once(command, bases, memory, processor, capsys, monkeypatch, tmp_path):
    processor("avx2")
    dtypes = []

    def recording(load):
        def loaded(*args):
            model = load(*args)
            dtypes.append(model.dtype)
            return model

        return loaded

    for name in ("load_base", "load_with_memory"):
        monkeypatch.setattr(loading, name, recording(getattr(loading, name)))
    test = texts(tmp_path / "test.jsonl", HELD_OUT)
    reference = texts(tmp_path / "reference.jsonl", TEXTS)
    built = ["--model", str(bases[BF16]), "--dataset", reference, "--output", str(tmp_path / "memory"), *QUICK]
    words = {
        "build": built,
        "quickstart": [*built, "--test-dataset", test],
        "evaluate": [str(memory), "--dataset", test],
    }
    assert main([command, *words[command]]) == 0
    assert dtypes == [FP32] * (2 if command == "quickstart" else 1)
    captured = capsys.readouterr()
    assert captured.err.count(" in float32, as this CPU has no fast bfloat16 instructions") == 1


def test_token_ids_are_checked_before_a_model_is_loaded(base, built, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(OlmoeForCausalLM, "from_pretrained", lambda *given, **how: pytest.fail("a model was loaded"))
    good, bad = (
        write_rows(tmp_path / name, [{"input_ids": [1, 2, last]}]) for name, last in (("a.jsonl", 3), ("b.jsonl", 260))
    )
    out = ["--output", str(tmp_path / "out")]
    build = ["--model", str(base), *out, "--dataset"]
    for words in (
        ["evaluate", str(built), "--dataset", bad],
        ["evaluate", str(built), "--dataset", good, "--off-dataset", bad],
        ["calibrate", str(built), "--ordinary-dataset", bad, *out],
        ["build", *build, bad],
        ["build", *build, good, "--ordinary-dataset", bad],
        ["quickstart", *build, bad, "--test-dataset", good],
        ["quickstart", *build, good, "--test-dataset", bad],
        ["quickstart", *build, good, "--test-dataset", good, "--off-dataset", bad],
    ):
        assert main(words) == 1, words
        message = one_error(capsys.readouterr(), words[0])
        assert "line 1: column 'input_ids' has 260 at place 2, outside of the model's vocabulary of 260" in message
