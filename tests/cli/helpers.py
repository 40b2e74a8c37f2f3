"""What the tests of the command line share: files of rows, and a look at what was printed."""

import json
import re
from pathlib import Path

import torch

from knnmoe_hf import RoutingMemory
from knnmoe_hf.cli import main
from tests.support.tokenizers import byte_tokenizer

TEXTS = ["the gate routes a token", "an expert is a small network", "the memory holds keys"]
HELD_OUT = ["the gate holds a key", "a network of experts is small"]
OTHERS = ["all routes are equal", "some tokens are rare", "no key was ever lost"]
QUICK = ["--builder-steps", "2", "--max-length", "16", "--batch-size", "4", "--num-neighbors", "4"]
"""A build of a second; `--confidence context` needs no calibration, which takes longer than the rest."""
QUICK += ["--confidence", "context"]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(path: Path, lines: list[str]) -> str:
    return write_rows(path, [{"text": line} for line in lines])


def examples(memory: RoutingMemory) -> list[str]:
    return [byte_tokenizer().decode(ids) for ids in memory.provenance.tokens().values()]


def cells(table: str, name: str) -> list[str]:
    """What the table says in the line of this name."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"{name}  ")]
    return line.removeprefix(name).split()


def one_error(captured, command: str) -> str:
    """The error's single line on stderr, where progress bars may have been too."""
    assert "Traceback" not in captured.err and captured.err.endswith("\n")
    (line,) = re.findall(rf"^knnmoe {command}: error: (.+)$", captured.err, re.MULTILINE)
    assert captured.err.splitlines()[-1].endswith(line)
    return line


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_rows(one: RoutingMemory, other: RoutingMemory) -> None:
    assert len(one) == len(other) and one.layers.keys() == other.layers.keys()
    for layer, rows in one.layers.items():
        for name, tensor in rows.tensors().items():
            assert torch.equal(tensor, other.layers[layer].tensors()[name])


def failed(words: list[str], capsys) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return one_error(captured, words[0])
