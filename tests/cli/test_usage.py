"""Usage errors: one line, exit code 2, the nearest option, and nothing heavy imported; help texts likewise."""

import re
import subprocess
import sys

import pytest

from knnmoe_hf.cli import main
from knnmoe_hf.cli.command import COMMANDS

BUILD = ["build", "--model", "m", "--dataset", "d", "--output", "o"]
EVALUATE = ["evaluate", "memory", "--dataset", "d"]
OWN = [name for name in COMMANDS if name != "lm-eval"]  # which has the options and the help of the harness
HEAVY = ("torch", "transformers", "datasets", "pandas", "numpy", "huggingface_hub", "yaml")


def refused(words: list[str], capsys) -> str:
    """The one line of a usage error."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert re.match(r"knnmoe( \w+)?: error: .+; see knnmoe( \w+)? --help$", line)
    return line


@pytest.mark.parametrize("command", OWN)
def test_help_gives_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert re.search(rf"^usage: knnmoe {command}\b.* \[options\]$", shown, re.MULTILINE)
    assert re.search(rf"^example:\n  knnmoe {command}\b.+", shown, re.MULTILINE)


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(re.search(rf"^ +{name}\b", shown, re.MULTILINE) for name in COMMANDS)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["--version"],
        ["biuld"],
        *([command, "--help"] for command in OWN),
        *([command, "--no-such-option"] for command in OWN),
        [*BUILD, "--gamma", "-1"],
        [*BUILD, "--builder", "greedy"],
        [*BUILD, "--candidate-steps", "10"],
        [*EVALUATE, "--half-life", "0"],
        ["build", "--model", "/no/such/model", "--dataset", "d", "--output", "o"],
        ["build", "--model", ".", "--dataset", "d", "--output", "setup.cfg/o"],
        ["info", "/no/such/memory"],
        ["merge", "/no/such/memory", ".", "--output", "o"],
    ],
    ids=" ".join,
)
def test_help_and_errors_of_usage_import_nothing_heavy(words):
    code = (
        "import sys\nfrom knnmoe_hf.cli import main\n"
        f"try:\n    code = main({words!r})\nexcept SystemExit as stop:\n    code = stop.code\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "sys.exit(f'{heavy} imported' if heavy else code)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = 0 if words[-1:] in (["--help"], ["--version"]) else 1 if "/no/such" in str(words) or "." in words else 2
    assert found.returncode == expected, found.stderr
    assert "imported" not in found.stderr and len(found.stderr.splitlines()) == (expected > 0)


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "name a command: build, evaluate"),
        (["fly"], "there is no command 'fly': choose one of build, evaluate,"),
        (["biuld"], "did you mean build?"),
        (["evalute", "m"], "did you mean evaluate?"),
        (["--verbose", "build"], "'--verbose' comes after the command, as in knnmoe build --verbose"),
        (["--versoin"], "did you mean --version?"),
        (["build", "--model", "m"], "required: --output"),
        (["build", "--modle", "m"], "there is no option '--modle': did you mean --model?"),
        ([*BUILD, "--builer", "topk"], "did you mean --builder?"),
        ([*BUILD, "--num_neighbors=3"], "did you mean --num-neighbors?"),
        ([*BUILD, "--batchsize", "3"], "did you mean --batch-size?"),
        ([*BUILD, "--ordinary-datasets", "x"], "did you mean --ordinary-dataset?"),
        ([*BUILD, "-model", "x"], "did you mean --model?"),
        ([*BUILD, "--xyzzy"], "there is no option '--xyzzy'; see"),
        # no abbreviations
        ([*BUILD, "--num-neigh", "3"], "there is no option '--num-neigh': did you mean --num-neighbors?"),
        ([*BUILD, "--value-sp", "delta"], "did you mean --value-space?"),
        (["info", "--pl", "model"], "there is no option '--pl'"),
        # renamed, and left out with a reason
        ([*BUILD, "--no-provenance"], "--no-provenance is --save-provenance none now"),
        ([*BUILD, "--solver-steps", "3"], "--solver-steps is --builder-steps now"),
        ([*BUILD, "--weight-decay", "0.1"], "--weight-decay is not an option of knnmoe build: a build optimises each"),
        ([*BUILD, "--hub-token", "x"], "the token is that of hf auth login, of the variable HF_TOKEN, or --token"),
        ([*BUILD, "--allow-overlap"], "knnmoe evaluate does"),
        ([*EVALUATE, "--key-dim", "8"], "--key-dim is not an option of knnmoe evaluate: it is fixed when a memory is"),
        ([*EVALUATE, "--value-space=delta"], "it is fixed when a memory is built"),
        # choices
        ([*BUILD, "--builder", "candidate"], "did you mean candidates? choose one of candidates, topk, search"),
        ([*BUILD, "--builder", "greedy"], "'greedy' is not allowed: choose one of"),
        ([*BUILD, "--value-space", "weights"], "choose one of assignment, logits, delta"),
        ([*BUILD, "--confidence", "Calibrated"], "did you mean calibrated?"),
        ([*BUILD, "--save-provenance", "tokens"], "choose one of text, ids, none"),
        ([*BUILD, "--dtype", "float99"], "choose one of auto, float32, bfloat16, float16"),
        ([*BUILD, "--dtype", "int8"], "'int8' is not allowed"),
        ([*BUILD, "--device-map", "gpu"], "use auto, balanced, cpu, cuda, cuda:0"),
        ([*BUILD, "--report-to", "wandbb"], "did you mean wandb?"),
        ([*BUILD, "--ddp-backend", "gloo"], "the launcher (torchrun)"),
        ([*BUILD, "--encoding", "klingon"], "'klingon' is not an encoding"),
        ([*BUILD, "--push-to-hub", "a b/c"], "'a b/c' is not a name of a repository"),
        ([*BUILD, "--push-to-hub", "a/b/c"], "'a/b/c' is not a name of a repository"),
        # numbers
        ([*BUILD, "--max-length", "0"], "'0' is not allowed: use an integer of at least 2"),
        ([*BUILD, "--max-length", "1"], "'1' is not allowed"),
        ([*BUILD, "--batch-size", "many"], "'many' is not allowed: use an integer of at least 1"),
        ([*BUILD, "--batch-size", "2.5"], "'2.5' is not allowed"),
        ([*BUILD, "--max-tokens", "-5"], "'-5' is not allowed"),
        ([*BUILD, "--seed", "4294967296"], "below 4294967296"),
        ([*BUILD, "--seed", "9" * 5000], "use an integer of at least 0"),
        ([*BUILD, "--max-steps", "0"], "--max-steps 0 is not allowed"),
        ([*BUILD, "--max-steps", "-2"], "'-2' is not allowed"),
        ([*BUILD, "--adam-beta1", "1"], "'1' is not allowed: use a finite number of at least 0, below 1"),
        ([*BUILD, "--learning-rate", "-0.1"], "--learning-rate -0.1 is not allowed"),
        ([*BUILD, "--learning-rate", "nan"], "'nan' is not allowed: use a finite number"),
        ([*BUILD, "--min-gain", "inf"], "'inf' is not allowed: use a finite number"),
        ([*BUILD, "--builder-steps", "0"], "--builder-steps 0 is not allowed: use an integer of at least 1"),
        ([*BUILD, "--num-layers", "0"], "--num-layers 0 is not allowed"),
        ([*BUILD, "--gamma", "-1"], "--gamma -1 is not allowed: use a finite number of at least 0"),
        ([*BUILD, "--temperature", "0"], "--temperature 0 is not allowed: use a positive number"),
        ([*BUILD, "--key-whitening", "1.5"], "--key-whitening 1.5 is not allowed: use a number from 0 to 1"),
        ([*BUILD, "--num-neighbors", "0"], "--num-neighbors 0 is not allowed"),
        ([*BUILD, "--num-neighbors", "1" * 30], "use an integer, below 2**63"),
        ([*BUILD, "--value-experts", "0"], "use an integer of at least 1, or all"),
        ([*BUILD, "--routing-width", "0"], "use an integer of at least 1, or union"),
        ([*BUILD, "--layers", "0", "0"], "--layers [0, 0] is not allowed"),
        ([*BUILD, "--layers", "-1"], "--layers [-1] is not allowed"),
        ([*EVALUATE, "--gamma", "nan"], "'nan' is not allowed"),
        ([*EVALUATE, "--half-life", "0"], "--half-life 0 is not allowed"),
        ([*EVALUATE, "--max-examples", "0"], "'0' is not allowed"),
        (["info", "--plan", "model", "--tokens", "0"], "'0' is not allowed"),
        (["quickstart", "--test-examples", "-1"], "'-1' is not allowed"),
        (["remove", "m", "--output", "o", "--example-ids", "x"], "'x' is not allowed: use an integer"),
        (["calibrate", "m", "--output", "o", "--batch-size", "0"], "'0' is not allowed"),
        # empty, missing and superfluous words
        ([*BUILD, "--run-name", ""], "'' is not allowed"),
        (["build", "--model", "", "--dataset", "d", "--output", "o"], "'' is not allowed"),
        ([*BUILD, "--gamma"], "--gamma: expected one argument"),
        ([*BUILD, "--ignore-columns"], "expected at least one argument"),
        ([*BUILD, "extra"], "'extra' is one word too many"),
        # combinations
        ([*BUILD, "--dataset", "e"], "--dataset is given twice: keep one of the two, or name several files by"),
        ([*BUILD, "--output=p"], "--output is given twice"),
        ([*EVALUATE, "--split", "a", "--split", "b"], "--split is given twice"),
        ([*BUILD, "--key-codec", "raw", "--key-dim", "4"], "--key-dim 4 does nothing with --key-codec raw"),
        ([*BUILD, "--search-backend", "ivf", "--hnsw-m", "4"], "--hnsw-m 4 does nothing with --search-backend ivf"),
        ([*EVALUATE, "--confidence", "rbf", "--half-life", "4"], "--half-life 4 does nothing with --confidence rbf"),
        ([*BUILD, "--routing-width", "union"], "--routing-width 'union' is not allowed with --value-space 'logits'"),
        ([*BUILD, "--candidate-steps", "10"], "use fewer than --builder-steps 10"),
        ([*BUILD, "--builder", "topk", "--num-candidates", "3"], "--num-candidates 3 is not allowed with --builder"),
        ([*BUILD, "--push-provenance", "text"], "--push-provenance is not allowed without --push-to-hub"),
        ([*BUILD, "--hub-private-repo"], "--hub-private-repo is not allowed without --push-to-hub"),
        ([*BUILD, "--quiet", "--verbose"], "--quiet and --verbose exclude each other"),
        ([*BUILD, "--use-cpu", "--device-map", "cuda:1"], "--use-cpu is not allowed with --device-map cuda:1"),
        ([*BUILD, "--report-to", "none", "wandb"], "stands alone"),
        (["build", "--model", "m", "--dataset", "d", "--output", "./m"], "is the model's own folder"),
        (["evaluate", "memory"], "name text with --dataset or --off-dataset"),
        ([*EVALUATE, "--off-dataset", "d"], "d is named twice"),
        ([*EVALUATE, "--off-split", "test"], "--off-split is not allowed without --off-dataset"),
        ([*EVALUATE, "--overwrite"], "--overwrite is not allowed without --output"),
        (["evaluate", "m", "--off-dataset", "d", "--split", "test"], "--split is not allowed without --dataset"),
        (["quickstart", "--split", "test"], "--split is not allowed with lab:KIND/SPLIT"),
        (["quickstart", "--dataset", "d", "--off-split", "test"], "--off-split is not allowed without --off-dataset"),
        (["info"], "one of the arguments memory --plan is required"),
        (["info", "memory", "--plan", "model"], "not allowed with"),
        (["info", "memory", "--tokens", "5"], "--tokens is for a plan"),
        (["info", "memory", "--gamma", "0.5"], "--gamma is for a plan"),
        (["merge", "m", "./m", "--output", "o"], "is the same memory twice"),
        (["merge", "m", "--output", "o"], "required: other"),
        (["remove", "m", "--output", "o"], "name what is to be taken out: --example-ids or --suspicious"),
        (["remove", "m", "--output", "o", "--suspicious", "--example-ids", "1"], "exclude each other"),
        (["select", "m", "--output", "o"], "name what is to be kept: --layers, --max-rows or --min-gain"),
        (["select", "m", "--output", "o", "--layers", "-1"], "use an integer of at least 0"),
        (["adjust", "m", "--output", "o"], "name what is to be set: --threshold"),
        (["adjust", "m", "--output", "o", "--layers", "1"], "knnmoe select keeps some of a memory's layers"),
        (["adjust", "m", "--output", "o", "--key-dtype", "int8"], "it is fixed when a memory is built"),
        (["push", "m"], "required: repo_id"),
        (["push", "m", "a b/c"], "'a b/c' is not a name of a repository"),
        (["push", "m", "./m"], "'./m' is not a name of a repository"),
        (["push", "m", "me/m", "--model", "/a/folder"], "'/a/folder' is not a name of a repository"),
        (["push", "m", "me/m", "--base-model-revision", "v1"], "--base-model-revision is not allowed without --model"),
        (["push", "m", "me/m", "--push-provenance", "all"], "choose one of text, ids, none"),
        (["push", "m", "me/m", "--save-provenance", "ids"], "--save-provenance is not an option of knnmoe push: what"),
        (["push", "m", "me/m", "--revision", "a", "--revision", "b"], "--revision is given twice"),
        (["push", "m", "me/m", "--token", ""], "'' is not allowed"),
        (["push", "m", "me/m", "--license", "x\ny"], "is not allowed"),
        (["pull", "me/m"], "required: folder"),
        (["pull", "a/b/c", "m"], "'a/b/c' is not a name of a repository"),
        (["pull", "me/m", "m", "--subfolder", ""], "'' is not allowed"),
        (["info", "/", "--revision", "v1"], "--revision 'v1' needs a repository, and '/' is a folder"),
        (["merge", "m", "/", "--output", "o", "--other-revision", "v1"], "and '/' is a folder: leave it out"),
        (["info", "--plan", "m", "--revision", "v1"], "--revision is for a memory"),
        (["info", "--plan", "m", "--subfolder", "x"], "--subfolder is for a memory"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line_with_the_way_out(words, said, capsys):
    assert said in refused(words, capsys)


@pytest.mark.parametrize(
    "words, said",
    [
        (["build", "--model", "/no/such/model", "--dataset", "d", "--output", "o"], "such/model' is not a folder"),
        (["build", "--model", "./no", "--dataset", "d", "--output", "o"], "'./no' is not a folder"),
        (["build", "--model", "setup.cfg", "--dataset", "d", "--output", "o"], "'setup.cfg' is a file"),
        (["build", "--model", "m", "--dataset", "d", "--output", "setup.cfg"], "--output 'setup.cfg' is a file"),
        (["build", "--model", "m", "--dataset", "d", "--output", "setup.cfg/a/b"], "setup.cfg' is a file"),
        (["build", "--model", "m", "--dataset", "d", "--output", "~/setup.cfg"], None),
        (["evaluate", "/no/m", "--dataset", "d"], "'/no/m' is not a folder: name one that a memory was saved to."),
        (["evaluate", "m", "--dataset", "d", "--model", "/no/base"], "'/no/base' is not a folder"),
        (["evaluate", "m", "--dataset", "d", "--output", "no/such/x.json"], "is in no folder"),
        (["evaluate", "m", "--dataset", "d", "--output", "knnmoe_hf"], "'knnmoe_hf' is a folder"),
        (["evaluate", "m", "--dataset", "d", "--output", "setup.cfg"], "holds something else"),
        (["calibrate", "/no/m", "--output", "o"], "'/no/m' is not a folder"),
        (["remove", "knnmoe_hf", "--example-ids", "1", "--output", "knnmoe_hf"], "is the memory that is read"),
        (["merge", "docs", "knnmoe_hf", "--output", "docs"], "is the memory that is read"),
        (["info", "--plan", "/no/base"], "'/no/base' is not a folder"),
        ([*BUILD, "--push-to-hub", "me/gates"], "HF_HUB_OFFLINE is set"),
        (["push", "/no/m", "me/m"], "'/no/m' is not a folder"),
        (["push", "m", "me/m"], "uploading to me/m is not possible while HF_HUB_OFFLINE is set"),
        (["pull", "me/m", "setup.cfg"], "'setup.cfg' is a file: name a folder"),
        (["pull", "me/m", "setup.cfg/m"], "'setup.cfg/m' cannot be made"),
        (
            ["remove", "tests", "--subfolder", "cli", "--example-ids", "1", "--output", "tests/cli"],
            "memory that is read",
        ),
        ([*BUILD[:4], "no.jsonl", *BUILD[5:]], "'no.jsonl' does not exist"),
        ([*BUILD[:4], "no/*.md", *BUILD[5:]], "'no/*.md' matches no file"),
        ([*BUILD[:4], "lab:topics", *BUILD[5:]], "there is no kind and split of text 'topics/'"),
        ([*BUILD, "--ordinary-dataset", "setup.cfg", "./no"], "'./no' does not exist"),
        ([*EVALUATE, "--off-dataset", "/no/x"], "'/no/x' does not exist"),
        (["quickstart", "--test-dataset", "no.txt"], "'no.txt' does not exist"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_what_is_not_there_is_told_before_a_model_is_loaded(words, said, capsys, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    monkeypatch.setattr("knnmoe_hf.cli.command.spoken", lambda options: 1 / 0)  # nothing may get that far
    if said is None:
        monkeypatch.setenv("HOME", str(request.config.rootpath))
        said = "is a file"
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert said in captured.err and captured.err.startswith(f"knnmoe {words[0]}: error: ")


def test_an_upload_without_a_token_is_refused_before_the_build(capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main([*BUILD, "--push-to-hub", "me/gates"]) == 1
    assert "needs a token: use hf auth login" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root
    assert main(["build", "--model", "m", "--dataset", "d", "--output", str(tmp_path / "a" / "b")]) == 1
    assert "cannot be written: name a folder of yours" in capsys.readouterr().err
