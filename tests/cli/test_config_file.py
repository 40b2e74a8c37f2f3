"""`--config file.yaml`: options from a file are those that would be typed, and the command line wins."""

import argparse

import pytest

from knnmoe_hf.cli.command import parse

BUILD = ["build", "--model", "m", "--dataset", "d", "--output", "o"]


@pytest.fixture
def options(tmp_path):
    """The options of a build with a file of this content, and these words."""

    def parsed(content: str, *words: str, command: list[str] = BUILD) -> argparse.Namespace:
        path = tmp_path / "file.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return parse([*command, "--config", str(path), *words])

    return parsed


def test_every_kind_of_value_is_taken_from_the_file(options):
    found = options(
        "# a comment\n"
        "gamma: 0.2\nnum-neighbors: 8\nvalue_space: delta\nlearning_rate: 1e-2\n"
        "layers: [0, 2]\nordinary-dataset:\n  - a.jsonl\n  - b c.jsonl\n"
        "skip_bad_rows: true\nbf16: no\nrun_name: 2024-01-01\nmin-gain: -0.5\nbatch_size: 3\nquiet: yes\n"
        "ignore_columns: only\nvalue_experts: all\n"
    )
    assert (found.gamma, found.num_neighbors, found.value_space, found.learning_rate) == (0.2, 8, "delta", 0.01)
    assert (found.layers, found.ordinary_dataset) == ([0, 2], ["a.jsonl", "b c.jsonl"])
    assert (found.skip_bad_rows, found.bf16, found.quiet) == (True, False, True)
    assert (found.run_name, found.min_gain, found.per_device_train_batch_size) == ("2024-01-01", -0.5, 3)
    assert (found.ignore_columns, found.value_experts) == (["only"], "all")


def test_the_file_may_hold_what_is_required(tmp_path):
    path = tmp_path / "all.yaml"
    path.write_text("model: m\ndataset: d\noutput: o\n")
    found = parse(["build", "--config", str(path)])
    assert (found.model, found.dataset, found.output) == ("m", "d", "o")
    path.write_text("dataset: [a, b]\noff_dataset: c\njson: true\n")
    for words in (["memory", "--config", str(path)], [f"--config={path}", "memory"]):
        found = parse(["evaluate", *words])
        assert (found.memory, found.dataset, found.off_dataset, found.json) == ("memory", ["a", "b"], ["c"], True)


def test_the_command_line_wins(options):
    content = "gamma: 0.2\nlayers: [0, 1]\nskip_bad_rows: true\nbatch_size: 3\nseed: 5\n"
    found = options(
        content, "--gamma", "0.9", "--layers", "3", "--no-skip-bad-rows", "--per-device-train-batch-size=7"
    )
    assert (found.gamma, found.layers, found.skip_bad_rows) == (0.9, [3], False)
    assert (found.per_device_train_batch_size, found.seed) == (7, 5)
    found = options("dataset: [a, b]\n", "--dataset", "c", command=["evaluate", "m"])
    assert found.dataset == ["c"]


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n", "{}", "\ufeffgamma: 0.2\n", '{"gamma": 0.2}'])
def test_an_empty_file_a_mark_and_json_are_fine(content, options):
    assert options(content).gamma in (None, 0.2)


@pytest.mark.parametrize(
    "content, said",
    [
        ("gama: 0.2\n", "line 1: there is no option '--gama': did you mean --gamma?"),
        ("seed: 1\nbuilder-step: 2\n", "line 2: there is no option '--builder-step': did you mean --builder-steps?"),
        ("weight_decay: 0.1\n", "--weight-decay is not an option of knnmoe build"),
        ("no_provenance: true\n", "--no-provenance is --save-provenance none now"),
        ("no-bf16: true\n", "write 'bf16: false' for no-bf16"),
        ("config: other.yaml\n", "config is for the command line only"),
        ("help: true\n", "help is for the command line only"),
        ("gamma: 0.2\nseed: 1\ngamma: 0.3\n", "line 3: gamma is there already, in line 1"),
        ("num-neighbors: 4\nnum_neighbors: 8\n", "num_neighbors is there already"),
        ("batch_size: 4\nper_device_train_batch_size: 8\n", "is there already"),
        ("gamma:\n", "--gamma has no value"),
        ("gamma: ~\n", "--gamma has no value"),
        ("run_name: null\n", "--run-name has no value"),
        ("layers: []\n", "--layers has no value"),
        ("layers: [0, null]\n", "--layers has no value"),
        ("run_name: ''\n", "'' is not allowed"),
        ("gamma: {a: 1}\n", "the value of --gamma is nested"),
        ("layers: [[0, 1]]\n", "the value of --layers is nested"),
        ("build:\n  gamma: 0.2\n", "there is no option '--build'"),
        ("gamma: [0.1, 0.2]\n", "--gamma takes one value and no list"),
        ("gamma: high\n", "'high' is not allowed: use a finite number"),
        ("gamma: true\n", "'true' is not allowed: use a finite number"),
        ("num_neighbors: 2.5\n", "'2.5' is not allowed: use an integer"),
        ("gamma: -1\n", "--gamma -1 is not allowed"),
        ("builder: greedy\n", "'greedy' is not allowed: choose one of"),
        ("bf16: maybe\n", "--bf16 is 'maybe': write true or false"),
        ("bf16: [true, false]\n", "write true or false"),
        ("- gamma\n- 0.2\n", "is not a mapping"),
        ("gamma\n", "is not a mapping"),
        ("gamma: 0.2: 3\n", "is no YAML"),
        ("gamma: [0.2\n", "is no YAML"),
        ("a: 1\n---\nb: 2\n", "is no YAML"),
        ("? [a, b]\n: 1\n", "there is no option"),
        ("gamma: 0.2\nstray: '\n", "is no YAML"),
        (b"run_name: \xff\xfe\n", "is no YAML"),
        (b"\x00\x01", "is no YAML"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_cannot_be_used_is_one_line(content, said, options, capsys):
    with pytest.raises(SystemExit) as stop:
        options(content)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and said in line and line.startswith("knnmoe build: error: ")


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for words, said in [
        (["--config", str(tmp_path / "no.yaml")], "cannot be read (No such file or directory)"),
        (["--config", str(tmp_path)], "cannot be read (Is a directory)"),
        (["--config=~/no.yaml"], "cannot be read (No such file"),
        (["--config"], "--config needs the name of a file"),
        (["--config="], "--config needs the name of a file"),
        (["--config", "--quiet"], "--config needs the name of a file"),
        (["--config", "a", "--config", "b"], "--config is given twice"),
    ]:
        with pytest.raises(SystemExit) as stop:
            parse([*BUILD, *words])
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and said in line


def test_every_command_reads_a_file(tmp_path):
    path = tmp_path / "quiet.yaml"
    path.write_text("quiet: true\n")
    for words in [
        BUILD,
        ["evaluate", "m", "--dataset", "d"],
        ["info", "m"],
        ["merge", "a", "b", "--output", "o"],
        ["remove", "m", "--example-ids", "1", "2", "--output", "o"],
        ["calibrate", "m", "--output", "o"],
        ["quickstart"],
    ]:
        assert parse([*words, "--config", str(path)]).quiet
