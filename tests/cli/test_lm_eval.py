"""`knnmoe lm-eval`: the harness's own command line, which knows memories and our tasks."""

import functools
import json
import subprocess
import sys

import pytest
from lm_eval.tasks import TaskManager

from knnmoe_hf.cli import main
from tests.evaluation.harness import save_models, save_tasks


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of two tasks; the harness's own 15,000 files are not read, which takes ten seconds."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    save_tasks(tmp_path)
    return tmp_path


def test_help_and_errors_of_usage_are_those_of_the_harness(capsys):
    for words, code in ((["--help"], 0), (["run", "--help"], 0), (["ls", "--no-such-option"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(["lm-eval", *words])
        assert stop.value.code == code
        assert "usage: lm-eval" in "".join(capsys.readouterr())
    assert main(["lm-eval"]) == 0 and "usage: lm-eval" in capsys.readouterr().out


def test_without_the_harness_one_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["lm-eval", "run", "--tasks", "mmlu"]) == 1
    said = "knnmoe lm-eval: error: knnmoe lm-eval needs lm_eval: pip install 'knnmoe_hf[eval]'\n"
    assert capsys.readouterr().err == said


def test_a_run_writes_what_the_harness_writes(models, folder, capsys):
    base, memory = models
    words = [
        "lm-eval",
        "run",
        "--model",
        "knnmoe",
        "--model_args",
        f"pretrained={base},memory={memory},num_neighbors=3",
    ]
    words += ["--include_path", str(folder), "--tasks", "which_thing", "--device", "cpu", "--limit", "3"]
    before = list(sys.argv)
    assert main([*words, "--log_samples", "--output_path", str(folder / "out")]) == 0
    assert "|which_thing|" in capsys.readouterr().out and sys.argv == before
    (results,) = (folder / "out").rglob("results_*.json")
    arguments = json.loads(results.read_text())["config"]["model_args"]
    assert arguments == {"pretrained": base, "memory": memory, "num_neighbors": 3}
    (samples,) = (folder / "out").rglob("samples_which_thing_*.jsonl")
    assert len(samples.read_text().splitlines()) == 3


def test_a_memory_is_a_model_of_the_type_hf_and_a_run_without_a_subcommand_is_one(models, folder, capsys):
    words = ["lm-eval", "--model", "hf", "--model_args", f"pretrained={models[1]}", "--include_path", str(folder)]
    assert main([*words, "--tasks", "which_thing", "--device", "cpu", "--limit", "2"]) == 0
    assert "|which_thing|" in capsys.readouterr().out


def test_our_tasks_are_there_beside_those_that_the_user_includes(folder, capsys):
    assert main(["lm-eval", "validate", "--tasks", "supergpqa_law,which_thing", "--include_path", str(folder)]) == 0
    assert main(["lm-eval", "validate", "--tasks", "supergpqa,lab_topics"]) == 0
    assert "All tasks found" in capsys.readouterr().out
    assert main(["lm-eval", "ls", "subtasks", "--include_path", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "go_on" in shown and "supergpqa_five_shot_law" in shown


def test_a_file_of_options_may_include_a_folder(models, folder, capsys):
    options = {"model": "hf", "model_args": {"pretrained": models[0]}, "tasks": ["go_on"], "limit": 1, "device": "cpu"}
    (folder / "options.yaml").write_text(json.dumps(options | {"include_path": str(folder)}))
    assert main(["lm-eval", "run", "--config", str(folder / "options.yaml")]) == 0
    assert "|go_on" in capsys.readouterr().out


def test_an_error_of_the_model_type_is_one_line(models, folder, capsys, monkeypatch):
    words = ["lm-eval", "run", "--model", "knnmoe", "--model_args", f"pretrained={models[0]},num_neighbors=2"]
    assert main([*words, "--include_path", str(folder), "--tasks", "go_on", "--device", "cpu"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("knnmoe lm-eval: error: num_neighbors=2 needs a memory")
    monkeypatch.setenv("LMEVAL_LOG_LEVEL", "DEBUG")
    with pytest.raises(ValueError, match="num_neighbors=2 needs a memory"):
        main([*words, "--include_path", str(folder), "--tasks", "go_on", "--device", "cpu"])


@pytest.mark.slow
def test_the_program_runs_with_all_tasks_of_the_harness(models, tmp_path):
    save_tasks(tmp_path)
    words = ["lm-eval", "--model", "knnmoe", "--model_args", f"pretrained={models[0]},memory={models[1]}"]
    words += ["--include_path", str(tmp_path), "--tasks", "which_thing", "--device", "cpu", "--limit", "1"]
    found = subprocess.run([sys.executable, "-m", "knnmoe_hf", *words], capture_output=True, text=True)
    assert found.returncode == 0 and "|which_thing|" in found.stdout, found.stderr
