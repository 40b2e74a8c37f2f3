"""`knnmoe compare` from the command line."""

import json

import pytest

from knnmoe_hf.cli import main
from tests.cli.helpers import one_error

METHOD = "  - {method: constant_bias, epochs: 1, learning_rates: [0.3]}\n"


@pytest.fixture
def config(tmp_path) -> str:
    text = "model: lab:olmoe\ndtype: float32\nmethods:\n" + METHOD + "tasks: [{name: lab_topics, off_tasks: []}]\n"
    text += "settings: {references: 6, limit: 4, off_limit: 3}\n"
    text += (
        "published: [{task: t, method: m, model: Another-Model, metric: acc, base: 1, value: 2, source: a paper}]\n"
    )
    (tmp_path / "small.yaml").write_text(text)
    return str(tmp_path / "small.yaml")


def test_a_comparison_runs_reports_and_is_not_run_again(config, tmp_path, capsys):
    words = ["compare", "--config", config, "--output", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "knnmoe: memory: about 33.9 MB for the weights" in said.err and "knnmoe: time: about" in said.err
    assert "lab_topics: constant_bias acc " in said.out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["complete"] and results["model"]["dtype"] == "float32"
    assert {row["method"]: row["status"] for row in results["results"]} == {"frozen": "done", "constant_bias": "done"}
    for page in ("report.md", "report.html"):
        assert "Another-Model" in (tmp_path / "out" / page).read_text()
    assert main([*words, "--quiet"]) == 0
    again = capsys.readouterr()
    assert (again.out, again.err) == (said.out, "")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert main([*words, "--limit", "3"]) == 1
    assert "holds a comparison with other settings: name a new folder" in one_error(capsys.readouterr(), "compare")


def test_a_plan_that_cannot_be_carried_out_does_not_claim_the_folder(config, tmp_path, capsys):
    words = ["compare", "--config", config, "--output", str(tmp_path / "out"), "--quiet"]
    assert main([*words, "--model", "own/er"]) == 1
    assert "the model 'own/er' cannot be loaded" in one_error(capsys.readouterr(), "compare")
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(config, tmp_path, capsys):
    assert main(["compare", "--config", config, "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "methods: frozen, constant_bias" in said
    assert "4 test items of each task and 3 of off-domain tasks, worked examples" in said
    assert "published: m of Another-Model on t: 1 -> 2 acc (a paper)" in said
    assert "memory: about 33.9 MB" in said and "from one measured forward pass" in said
    assert not (tmp_path / "out").exists()


def test_code_of_a_model_needs_consent_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    words = ["compare", "--model", "lab:olmoe", "--methods", "dsmoe", "--tasks", "human_eval_plumbing", "--quiet"]
    words += ["--output", str(tmp_path / "out"), "--references", "2", "--limit", "1"]
    assert main(words) == 1
    said = one_error(capsys.readouterr(), "compare")
    assert "task 'human_eval_plumbing' runs code that the model writes: add --confirm-run-unsafe-code" in said
    assert main([*words, "--confirm-run-unsafe-code"]) == 1
    assert "set HF_ALLOW_CODE_EVAL=1" in one_error(capsys.readouterr(), "compare")
    assert main([*words, "--dry-run"]) == 0
    assert "missing: task 'human_eval_plumbing' runs code" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_papers_grid_is_planned_without_model_and_data(tmp_path, capsys):
    words = ["--config", "olmoe-1b-7b", "--tasks", "lab_topics"]
    assert main(["compare", *words, "--output", str(tmp_path / "out"), "--dry-run"]) == 1
    assert "there is no 'lab_topics' here: choose among mmlu" in one_error(capsys.readouterr(), "compare")
    assert main(["compare", *words[:2], "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "olmoe-1b-7b: allenai/OLMoE-1B-7B-0924" in said
    assert "missing: task 'mmlu'" in said
    assert "memory: about 13.8 GB for the weights" in said and "200,000 reference tokens" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--model is missing: name a comparison with --config, or all of --model, --methods and --tasks"),
        (["--model", "lab:olmoe", "--tasks", "lab_topics"], "--methods is missing"),
        (["--config", "lab", "--off-tasks", "lab_python"], "--off-tasks is not allowed with --config"),
        (["--config", "lab", "--limit", "0"], "'0' is not allowed: use an integer of at least 1"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_loaded(words, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--output", str(tmp_path / "out"), *words])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config", "labs"], "'labs' is neither a file nor a comparison: choose among gpt-oss-20b, lab"),
        (["--model", "lab:olmo", "--methods", "dsmoe", "--tasks", "lab_topics"], "'lab:olmo' is not a lab model"),
        (["--model", "lab:olmoe", "--methods", "dsmo", "--tasks", "lab_topics"], "method='dsmo' is not known"),
        pytest.param(  # all names of the harness are read, to find the nearest
            ["--model", "lab:olmoe", "--methods", "dsmoe", "--tasks", "lab_topic"],
            "there is no task 'lab_topic'",
            marks=pytest.mark.slow,
        ),
        (["--model", "./nowhere", "--methods", "dsmoe", "--tasks", "lab_topics"], "'./nowhere' is not a folder"),
        (["--model", "own/er", "--methods", "dsmoe", "--tasks", "lab_topics"], "the model 'own/er' cannot be loaded"),
    ],
)
def test_what_is_missing_is_told_in_one_line(words, says, tmp_path, capsys):
    assert main(["compare", "--output", str(tmp_path / "out"), *words]) == 1
    assert says in one_error(capsys.readouterr(), "compare")
