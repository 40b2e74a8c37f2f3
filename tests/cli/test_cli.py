"""The `knnmoe` command in process, on a tiny model with a byte-level tokenizer and files of each form."""

import csv
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import knnmoe_hf
from knnmoe_hf import RoutingMemory
from knnmoe_hf.cli import main
from knnmoe_hf.cli.inside import level_of
from knnmoe_hf.data.examples import prepare_dataset
from knnmoe_hf.evaluation import score, without_overlap
from tests.cli.helpers import HELD_OUT, OTHERS, QUICK, TEXTS, cells, examples, one_error, texts, write_rows
from tests.conftest import random_memory
from tests.support.tokenizers import byte_tokenizer


def build(base: Path, dataset: str, output: Path, *more: str) -> RoutingMemory:
    words = ["build", "--model", str(base), "--dataset", dataset, "--output", str(output), *QUICK, *more]
    assert main(words) == 0
    return RoutingMemory.from_pretrained(output)


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"knnmoe {knnmoe_hf.__version__}\n"


@pytest.mark.parametrize(
    "change, named",
    [
        ({"--dataset": "/no/such.jsonl"}, "'/no/such.jsonl' does not exist"),
        ({"--dataset": "lab:poems/train"}, "there is no kind and split of text 'poems/train'"),
        ({"--layers": "9"}, "layers=[9]"),
        ({"--max-tokens": "3"}, "gives no example"),
        ({"--split": "test"}, "test"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_exits_with_one(change, named, base, tmp_path, capsys):
    given = {"--model": str(base), "--dataset": texts(tmp_path / "x.jsonl", TEXTS), "--output": str(tmp_path / "o")}
    assert main(["build", *(word for pair in (given | change).items() for word in pair)]) == 1
    captured = capsys.readouterr()
    assert named in one_error(captured, "build") and captured.out == ""
    assert not list((tmp_path / "o").glob("*"))


def test_columns_that_are_not_understood_are_named(base, tmp_path, capsys):
    dataset = write_rows(tmp_path / "x.jsonl", [{"sentence": "a"}])
    assert main(["build", "--model", str(base), "--dataset", dataset, "--output", str(tmp_path / "o")]) == 1
    assert "['sentence']" in one_error(capsys.readouterr(), "build")


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"knnmoe info: error: {tmp_path} holds no memory: there is no config.json; name a folder that a memory was "
        "saved to."
    ]
    with pytest.raises(ValueError, match="holds no memory"):
        main(["info", str(tmp_path), "--debug"])


def test_a_build_ends_with_the_verdict_what_is_inside_and_the_next_command(base, tmp_path, capsys):
    memory = build(base, texts(tmp_path / "x.jsonl", ["a gate"]), tmp_path / "o", "--value-space", "delta")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{memory!r} saved to {tmp_path / 'o'}"
    assert lines[1] == memory.verdict.sentences()[0] and memory.verdict.outcome == "too few references"
    assert lines[2:4] == memory.verdict.sentences()[1:]
    assert lines[4] == "The text of 1 reference is inside, as token ids."
    assert lines[5] == "Keys of 5 reference tokens are inside: hidden states of the model, which depend on the text."
    assert lines[6] == "To leave the text out, use --save-provenance ids or none with the same command."
    assert lines[7].startswith(f"Next: knnmoe evaluate {tmp_path / 'o'} --dataset") and len(lines) == 8
    assert (memory.origin.options["value_space"], memory.config.num_neighbors, len(memory)) == ("delta", 4, 5)
    assert memory.config.base_model_name_or_path == str(base)


def test_a_default_build_is_calibrated_on_this_machines_text_or_on_what_is_given(base, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)  # long paths are shortened in the log
    dataset = texts(tmp_path / "x.jsonl", [f"the gate routes token {n}" for n in range(8)])
    for kind in "ab":
        texts(tmp_path / f"{kind}.jsonl", [f"{kind} {n} is other text" for n in range(3)])

    def calibrated(name: str, *more: str) -> str:
        caplog.clear()
        with caplog.at_level("INFO", "knnmoe_hf.calibration"):
            build(base, dataset, tmp_path / name, "--confidence", "calibrated", *more)
        return "\n".join(record.getMessage() for record in caplog.records)

    given = calibrated("given", "--ordinary-dataset", "a.jsonl", "b.jsonl")
    assert "a.jsonl" in given and "python" not in given
    assert "python" in calibrated("default")


def test_build_stores_targets_of_completions_only(base, tmp_path):
    rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "one and one is ", "completion": "two, we think"}]
    memory = build(base, write_rows(tmp_path / "x.jsonl", rows), tmp_path / "o")
    # "4<end>", and the first byte of "two": a pair is cut at 16 tokens, not split
    assert examples(memory) == ["2+2=4<end>", "one and one is t"] and len(memory) == 3


def test_a_long_text_becomes_several_examples(base, tmp_path):
    text = "a text of more than two windows of 16"
    memory = build(base, texts(tmp_path / "x.jsonl", [text, "short"]), tmp_path / "o")
    assert examples(memory) == [text[:16], text[16:32], text[32:], "short"] and len(memory) == 15 + 15 + 4 + 4


def test_a_text_file_is_one_text_and_a_csv_has_one_in_each_row(base, tmp_path):
    (tmp_path / "x.txt").write_text("two\n\nlines\n")
    assert examples(build(base, str(tmp_path / "x.txt"), tmp_path / "txt")) == ["two\n\nlines\n"]
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ["first, quoted"], ["second"]])
    assert examples(build(base, str(tmp_path / "x.csv"), tmp_path / "csv")) == ["first, quoted", "second"]


def test_max_tokens_takes_the_first_examples(base, tmp_path):
    dataset = texts(tmp_path / "x.jsonl", ["1234567", "7654321", "one more"])
    assert examples(build(base, dataset, tmp_path / "o", "--max-tokens", "15")) == ["1234567", "7654321"]


def test_a_repository_that_holds_something_else_is_refused_before_the_build(base, tmp_path, hub, capsys):
    hub.create("me/gates")
    hub.commit("me/gates", {"README.md": "mine"})
    words = ["build", "--model", str(base), "--dataset", texts(tmp_path / "x.jsonl", ["a gate"])]
    assert main([*words, "--output", str(tmp_path / "o"), "--push-to-hub", "me/gates"]) == 1
    assert "README.md" in capsys.readouterr().err and not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "words, saved, pushed",
    [
        ([], "text", "ids"),
        (["--push-provenance", "text"], "text", "text"),
        (["--save-provenance", "ids"], "ids", "ids"),
        (["--save-provenance", "none"], "none", "none"),
        (["--save-provenance", "none", "--push-provenance", "ids", "--hub-private-repo"], "none", "ids"),
    ],
)
def test_what_is_saved_and_what_is_uploaded(words, saved, pushed, base, tmp_path, hub, capsys):
    dataset = texts(tmp_path / "x.jsonl", ["a gate"])
    memory = build(base, dataset, tmp_path / "o", "--push-to-hub", "me/gates", *words)
    captured = capsys.readouterr()
    found = RoutingMemory.from_pretrained("me/gates")
    assert (level_of(memory), level_of(found)) == (saved, pushed)
    assert hub.repository("me/gates").private == ("--hub-private-repo" in words)
    assert torch.equal(found.layers[0].decoded_keys, memory.layers[0].decoded_keys)
    place = f"{hub.endpoint}/me/gates/commit/{hub.commits('me/gates')[0].oid}"
    assert captured.out.splitlines()[-1] == f"uploaded with provenance {pushed}: {place}"
    said = {"text": "as token ids", "ids": "hashes of some of the text are", "none": "nor which reference a row"}
    assert said[saved] in captured.out and ("To leave the text out" in captured.out) == (saved == "text")


def test_evaluate_prints_base_against_memory(built, tmp_path, capsys):
    lines = [*HELD_OUT, *OTHERS]
    dataset = texts(tmp_path / "test.jsonl", lines)
    assert main(["evaluate", str(built), "--dataset", dataset, "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(built, dtype=torch.float32).eval()
    rows = prepare_dataset([{"text": text} for text in lines], byte_tokenizer(), None)
    memory = score(model, rows)
    with knnmoe_hf.disable_memory(model):
        base = score(model, rows)
    assert cells(shown, "windows") == ["5"] and cells(shown, "windows left out") == ["0"]
    _, overlap = without_overlap(RoutingMemory.from_pretrained(built), rows)
    assert cells(shown, "overlap with references") == [f"{100 * overlap.share:.1f}", "%"]
    assert cells(shown, "tokens") == [f"{base.tokens.sum():.0f}"] and base.tokens.sum() > 40
    assert cells(shown, "NLL base") == [f"{base.mean_nll:.4f}"]
    assert cells(shown, "NLL memory") == [f"{memory.mean_nll:.4f}"] != cells(shown, "NLL base")
    assert cells(shown, "perplexity memory") == [f"{memory.perplexity:.2f}"]
    assert cells(shown, "accuracy base, %") == [f"{100 * base.accuracy:.2f}"]
    change, low, high = re.findall(r"^  change \[95 %\] +(\S+) \[(\S+), (\S+)\]$", shown, re.MULTILINE)[0]
    assert float(change) == pytest.approx(memory.mean_nll - base.mean_nll, abs=1e-4)
    assert float(low) < float(change) < float(high)
    assert 0 < float(cells(shown, "confidence, layer 1")[0]) < 1
    size = sum(RoutingMemory.from_pretrained(built).nbytes_per_layer.values())
    assert f"memory: {size:,} bytes in 2 layers" in shown


def test_a_memory_without_a_tokenizer_is_evaluated_with_its_base_models(base, tmp_path, capsys):
    random_memory(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(tmp_path / "m")
    dataset = texts(tmp_path / "test.jsonl", ["a gate"])
    assert main(["evaluate", str(tmp_path / "m"), "--dataset", dataset, "--max-examples", "1"]) == 0
    assert cells(capsys.readouterr().out, "tokens") == ["5"]
