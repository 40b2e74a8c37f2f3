"""What counts as a fast dtype on a CPU, on simulated processors, and the warning of a model in a slow one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from knnmoe_hf import KNNMoEForCausalLM, attach_memory
from knnmoe_hf.models import precision
from knnmoe_hf.models.precision import is_fast_on_cpu, warn_if_slow
from tests.support.models import random_memory, tiny_model

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def no_warning_yet():
    precision._warn_once.cache_clear()
    yield
    precision._warn_once.cache_clear()


@pytest.fixture
def processor(monkeypatch):
    """Simulates a CPU with these capabilities, of which oneDNN uses what it has unless `onednn` is False."""

    def simulate(*names: str, onednn: bool = True) -> None:
        monkeypatch.setattr(precision, "_cpu_capabilities", lambda: dict.fromkeys(names, True))
        monkeypatch.setattr(precision, "_onednn_supports", lambda dtype: onednn)

    return simulate


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == precision.__name__]


@pytest.mark.parametrize(
    "capabilities, bfloat16, float16",
    [
        ((), False, False),
        (("avx2", "f16c", "fma3"), False, False),
        (("avx2", "avx512_f", "avx512_vnni"), False, False),
        (("avx2", "avx512_f", "avx512_bf16"), True, False),
        (("avx512_f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile"), True, True),
        (("neon", "dot"), False, False),
        (("neon", "dot", "fp16_arith"), False, True),
        (("neon", "bf16", "fp16_arith", "sve"), True, True),
    ],
)
def test_a_dtype_is_fast_where_the_cpu_has_its_instructions(capabilities, bfloat16, float16, processor):
    processor(*capabilities)
    assert (is_fast_on_cpu(BF16), is_fast_on_cpu(FP16)) == (bfloat16, float16)
    assert is_fast_on_cpu(torch.float32) and is_fast_on_cpu(torch.float64)


def test_a_dtype_that_pytorch_multiplies_without_its_matrix_library_is_slow(processor):
    processor("bf16", "fp16_arith", onednn=False)  # as PyTorch for macOS
    assert not is_fast_on_cpu(BF16) and not is_fast_on_cpu(FP16) and is_fast_on_cpu(torch.float32)


@pytest.mark.parametrize(
    "content, bfloat16, float16",
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\nbugs\t\t: none\n", True, False),
        ("processor\t: 0\nmodel name\t: avx512_bf16 amx_bf16\nflags\t\t: fpu avx2\n", False, False),
        ("processor\t: 0\nFeatures\t: fp asimd asimdhp i8mm bf16\n", True, True),
        ("processor\t: 0\nFeatures\t: fp asimd svebf16\n", False, False),
        ("nothing of the kind", False, False),
        (None, False, False),
    ],
)
def test_an_older_pytorch_leaves_it_to_linux(content, bfloat16, float16, monkeypatch, tmp_path):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(precision, "_onednn_supports", lambda dtype: True)
    monkeypatch.setattr(precision, "_CPUINFO", tmp_path / "cpuinfo")
    if content is not None:
        (tmp_path / "cpuinfo").write_text(content)
    assert (is_fast_on_cpu(BF16), is_fast_on_cpu(FP16)) == (bfloat16, float16)


def test_an_unknown_name_of_the_matrix_librarys_answer_is_no_error(monkeypatch, processor):
    monkeypatch.setattr(precision, "_cpu_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(precision, "_ONEDNN_CHECKS", {BF16: "_renamed_in_a_later_pytorch"})
    assert is_fast_on_cpu(BF16) == torch.backends.mkldnn.is_available()


@pytest.mark.slow
def test_this_pytorch_says_that_avx2_alone_is_slow():
    code = "import torch; from knnmoe_hf.models.precision import is_fast_on_cpu as f; print(f(torch.bfloat16))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_a_model_in_a_slow_dtype_is_warned_of_once(processor, caplog):
    processor("avx2")
    for model in (tiny_model("olmoe").bfloat16(), tiny_model("gpt_oss").bfloat16()):
        warn_if_slow(model)
    (said,) = warnings(caplog)
    assert "bfloat16" in said and "dtype=torch.float32" in said


@pytest.mark.parametrize(
    "dtype, capabilities, warned",
    [
        (BF16, ["avx512_bf16"], False),
        (FP16, ["avx512_bf16"], True),
        (FP16, ["avx512_bf16", "avx512_fp16"], False),
        (torch.float32, [], False),
    ],
)
def test_a_warning_is_about_this_dtype_on_this_cpu(dtype, capabilities, warned, processor, caplog):
    processor(*capabilities)
    warn_if_slow(tiny_model("olmoe").to(dtype))
    assert len(warnings(caplog)) == warned


def test_most_weights_decide(processor, caplog):
    processor("avx2")
    model = tiny_model("olmoe")
    experts = [layer.mlp.experts for layer in model.model.layers]  # few tensors, most of the numbers
    model.bfloat16()
    for module in experts:
        module.float()
    warn_if_slow(model)
    assert not warnings(caplog)
    model.float()
    for module in experts:
        module.bfloat16()
    warn_if_slow(model)
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(
    "device_map, warned",
    [
        ({"": "cpu"}, True),
        ({"": torch.device("cpu")}, True),
        ({"model.layers": "cpu", "lm_head": "disk"}, True),
        ({"": 0}, False),
        ({"": "cuda:0"}, False),
        ({"": torch.device("mps", 0)}, False),
        ({"model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "disk"}, False),
    ],
)
def test_a_model_that_is_not_wholly_on_the_cpu_is_left_alone(device_map, warned, processor, caplog):
    processor("avx2")
    model = tiny_model("olmoe").bfloat16()
    model.hf_device_map = device_map
    warn_if_slow(model)
    assert len(warnings(caplog)) == warned


def test_a_model_without_weights_is_left_alone(processor, caplog):
    processor("avx2")
    warn_if_slow(tiny_model("olmoe").bfloat16().to("meta"))
    assert not warnings(caplog)


def test_attaching_warns_once_and_keeps_the_dtype_that_was_asked_for(processor, caplog, tmp_path):
    processor("avx2")
    model = tiny_model("olmoe")
    model.bfloat16().save_pretrained(tmp_path / "base")
    memory = random_memory(model)
    attach_memory(model, memory)
    (said,) = warnings(caplog)
    assert "bfloat16" in said
    again = KNNMoEForCausalLM.from_pretrained(tmp_path / "base", memory=memory, dtype="auto")
    assert again.dtype == BF16 and len(warnings(caplog)) == 1


def test_loading_a_memory_in_float32_warns_of_nothing(processor, caplog, tmp_path):
    processor("avx2")
    model = tiny_model("olmoe").bfloat16()
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    attach_memory(model, random_memory(model))
    assert model.dtype == torch.float32 and not warnings(caplog)
