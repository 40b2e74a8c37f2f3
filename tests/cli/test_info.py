"""`knnmoe info`: what a memory holds, whether it is still what was saved, and how large one would be."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from knnmoe_hf import RoutingMemory
from knnmoe_hf.cli import main
from knnmoe_hf.lookup.recall_fit import RecallFit
from knnmoe_hf.memory.manifest import CalibrationRecord
from tests.cli.helpers import one_error
from tests.memory.helpers import background, calibration_record
from tests.support.models import PLAIN, random_memory

ALL = {"value_experts": "all"}
PLAIN_WORDS = [word for name, value in (PLAIN | ALL).items() for word in (f"--{name.replace('_', '-')}", value)]


def test_info_prints_what_a_memory_holds(built, base, capsys):
    memory = RoutingMemory.from_pretrained(built)
    assert main(["info", str(built)]) == 0
    shown = capsys.readouterr().out
    assert f"base model {base} (OlmoeForCausalLM)" in shown
    assert f"{len(memory):,} rows in 2 layers, {memory.nbytes:,} bytes" in shown
    lines = shown.splitlines()
    assert lines[:4] == [str(built), *memory.verdict.sentences()]
    assert lines[4] == "The text of 6 references is inside, as token ids."
    for name, value in memory.config.options().items():
        assert f"  {name} = {value}\n" in shown
    for layer, rows in memory.layers.items():
        codecs = 32 * 32 * 4 + 3 * 32 * 4 + 2 * 8 * 4  # axes, bias, step and mean of keys, step and offset of values
        stored = len(memory) * (32 + 8) + codecs + 4 * rows.distances.numel()
        sizes = f"layer {layer}: keys [{len(memory)}, 32], values [{len(memory)}, 8], {stored:,} bytes"
        assert sizes in shown and f"distance scale {rows.scale:.4g}" in shown
    source = memory.provenance
    learnt = f"NLL {source.nll_before.mean():.3f} -> {source.nll_after.mean():.3f} nats per token"
    assert f"references under their own optimised routing, which says nothing of other text: {learnt}" in shown
    assert shown.index(learnt) > shown.index("  layer 1:")  # a late detail
    assert re.search(r"written by knnmoe_hf \S+, safetensors \S+, torch \S+, transformers \S+\n", shown)
    assert "checked: 1 file(s)" in shown


def test_info_says_what_is_not_known(base, tmp_path, capsys):
    memory = random_memory(AutoModelForCausalLM.from_pretrained(base), rows=7)
    memory.save_pretrained(tmp_path / "rows")
    memory.save_pretrained(tmp_path / "bare", provenance="none")
    assert main(["info", str(tmp_path / "rows")]) == 0
    shown = capsys.readouterr().out
    assert "ids of 7 references" in shown and "NLL" not in shown and "was not measured" in shown
    assert main(["info", str(tmp_path / "bare")]) == 0
    assert "nor which reference a row came from" in capsys.readouterr().out


def test_info_as_json(built, base, capsys):
    memory = RoutingMemory.from_pretrained(built)
    assert main(["info", str(built), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["sentences"] == memory.verdict.sentences() and found["verdict"]["outcome"] == memory.verdict.outcome
    assert found["inside"]["provenance"] == "text" and found["inside"]["examples"] == 6
    assert (found["rows"], found["bytes"], found["options"]) == (len(memory), memory.nbytes, memory.config.options())
    assert found["base_model"]["name"] == str(base) and list(found["layers"]) == ["0", "1"]
    assert main(["info", "--plan", str(base), "--tokens", "10", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens"] == 10 and plan["bytes"] == plan["key_bytes"] + plan["value_bytes"]


def test_info_prints_what_was_read_for_a_calibration_that_fell_back(base, tmp_path, capsys):
    record = CalibrationRecord(None, None, None, {}, [], {"python": background()})
    memory = random_memory(AutoModelForCausalLM.from_pretrained(base), rows=7)
    replace(memory, calibration=record).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "not calibrated" in shown and "python (its maker's machine): not used; 2 examples, 512 tokens" in shown
    assert "| calibrated against | nothing |" in (tmp_path / "README.md").read_text()


def test_info_prints_what_a_calibration_read_and_found(base, tmp_path, capsys):
    kinds = {
        "python": background(files=["a.py", "b.py"]),
        "law": background("given", files=[], tokens=1024),
        "empty": background("given", files=[], examples=0, tokens=0),
    }
    memory = random_memory(AutoModelForCausalLM.from_pretrained(base), rows=7)
    replace(memory, calibration=calibration_record(background=kinds)).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    shown, digest = capsys.readouterr().out, "5e" * 32
    assert "calibrated: threshold 0.6, expected gain 0.3000 of 0.4000 nats per token" in shown
    sizes = f"2 examples, 512 tokens, SHA-256 {digest}"
    assert f"  python (its maker's machine): costs 0.0020 nats per token; {sizes}\n    from a.py, b.py\n" in shown
    assert "  law (given): left out, as the memory helps on it; 2 examples, 1,024 tokens" in shown
    assert "  empty (given): not used; 0 examples, 0 tokens" in shown
    memory.save_pretrained(tmp_path / "plain")
    assert main(["info", str(tmp_path / "plain")]) == 0
    assert "calibrated:" not in capsys.readouterr().out


def test_info_prints_what_was_fitted_for_next_tokens(base, tmp_path, capsys):
    fit = RecallFit(0.6, 0.08, 0.5, 0.25, 64, 0.7, {"python": 0.001, "law": 0.002})
    fits = {"both": replace(fit, routing_threshold=2.38), "next_tokens": fit}
    memory = random_memory(AutoModelForCausalLM.from_pretrained(base), rows=7)
    replace(memory, calibration=calibration_record(fits=fits)).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    both, alone = "weight 0.5, threshold 0.6, routing from threshold 2.38", "weight 0.5, threshold 0.6"
    votes = "64 neighbours, temperature 0.25"
    gain = "expected gain 0.7000 nats per token, costs 0.0020 at worst (law)"
    shown = capsys.readouterr().out
    assert f"  fitted for recall both: {both}, {votes}; {gain}\n" in shown
    assert f"  fitted for recall next_tokens: {alone}, {votes}; {gain}\n" in shown
    assert main(["info", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"]["fits"]["both"]["next_token_neighbors"] == 64


def flip_a_byte(folder, place: int) -> None:
    """Without a trace in the file's size and time."""
    (shard,) = folder.glob("memory-*.safetensors")
    before = shard.stat()
    content = bytearray(shard.read_bytes())
    content[place] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (shard.stat().st_size, shard.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("place", [-1, -1000, 4000])
def test_info_finds_an_edited_byte_in_a_file_that_was_sound_before(place, built, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(built, folder)
    assert main(["info", str(folder)]) == 0
    flip_a_byte(folder, place)
    capsys.readouterr()
    assert main(["info", str(folder)]) == 1
    captured = capsys.readouterr()
    (shard,) = folder.glob("memory-*.safetensors")
    assert f"{shard} is not usable: its SHA-256" in one_error(captured, "info") and captured.out == ""


def test_info_refuses_what_is_no_memory(base, capsys):
    assert main(["info", str(base)]) == 1
    assert "is of model_type 'olmoe'" in one_error(capsys.readouterr(), "info")
    assert main(["info", "no/such/folder"]) == 1
    assert "'no/such/folder' is not a folder" in one_error(capsys.readouterr(), "info")


@pytest.mark.parametrize(
    "name, gates, sizes, layers",
    [
        ("allenai/OLMoE-1B-7B-0924", "16 gates, rule softmax_topk, top-8", (2048, 64), 16),
        ("Qwen/Qwen3-30B-A3B", "48 gates, rule softmax_topk_renormalized, top-8", (2048, 128), 48),
        ("openai/gpt-oss-20b", "24 gates, rule topk_softmax, top-4", (2880, 32), 24),
    ],
)
def test_a_plan_of_a_released_model_needs_no_network(name, gates, sizes, layers, capsys):
    hidden, experts = sizes
    for form, keys, values in (
        (
            [],
            500 * 48 + (48 * (hidden + 2) + hidden) * 4,
            500 * (16 * 2 + 2) + 8 if experts > 34 else (500 + 8) * experts,
        ),
        (PLAIN_WORDS, 500 * hidden * 4, 500 * experts * 4),
    ):
        assert main(["info", "--plan", name, "--tokens", "500", *form]) == 0
        shown = capsys.readouterr().out
        total = layers * (keys + values + 500 * 16 * 4)  # with the distances of every row
        assert f"{name}: {gates}\n" in shown and f"hidden size {hidden}, {experts} experts\n" in shown
        assert f"500 reference tokens: {total:,} bytes" in shown and f"{total / 500:,.0f} bytes a token" in shown


def test_a_plan_follows_the_memory_options(base, capsys):
    words = [*PLAIN_WORDS, "--key-dtype", "bfloat16", "--layers", "1", "--num-neighbors", "4"]
    assert main(["info", "--plan", str(base), "--tokens", "10", *words]) == 0
    assert "10 reference tokens: 1,120 bytes (keys 800, values 320)" in capsys.readouterr().out
    words = ["--key-codec", "pca", "--key-dim", "8", "--value-experts", "2", "--layers", "0", "--num-neighbors", "4"]
    assert main(["info", "--plan", str(base), "--tokens", "10", *words]) == 0
    keys, values = 10 * 8 + (8 * 34 + 32) * 4 + 10 * 4 * 4, 10 * (2 + 2 + 2) + 2 * 4
    assert f"{keys + values:,} bytes (keys {keys:,}, values {values:,})" in capsys.readouterr().out
    assert main(["info", "--plan", str(base), "--layers", "5"]) == 1
    assert "[5] have no gate" in one_error(capsys.readouterr(), "info")


def test_a_memory_cannot_be_planned_for(built, capsys):
    assert main(["info", "--plan", str(built)]) == 1
    assert "name its base model" in one_error(capsys.readouterr(), "info")
