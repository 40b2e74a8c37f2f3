"""The runner and its report on a tiny model: what is written, what is skipped, and what is refused."""

import json

import pytest

from benchmarks import texts
from benchmarks.effect import run
from benchmarks.effect.figures import entries_of
from benchmarks.effect.run import main
from knnmoe_hf.lab import LAB_MODELS
from tests.support.models import tiny_model
from tests.support.tokenizers import byte_tokenizer

MEMORY, ROUTERS, BIAS = "context, 0.88", "router-only", "constant bias"
WORDS = "the patient was given a dose of the drug and then slept well for the night while it rained".split()


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Runs the benchmark on a tiny lab model with a little text; what it printed of its measurements."""

    def documents(kind: str, split: str) -> list[str]:
        at = sum(map(ord, kind + split))
        return [" ".join(WORDS[(i * 3 + j * j + at) % len(WORDS)] for j in range(60)) for i in range(20)]

    def run(*settings: str, more: tuple = ()) -> list[str]:
        trial = "--references 2 --test-windows 4 --labs olmoe --kinds topics --seeds 0".split()
        capsys.readouterr()
        main([*trial, "--results", str(tmp_path), "--settings", *settings, *more])
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("olmoe-topics-0")]

    tiny_model("olmoe", vocab_size=260, max_position_embeddings=512).save_pretrained(tmp_path / "lab")
    byte_tokenizer().save_pretrained(tmp_path / "lab")
    monkeypatch.setitem(LAB_MODELS, "olmoe", tmp_path / "lab")
    monkeypatch.setattr(texts, "documents", documents)
    monkeypatch.setattr("benchmarks.effect.run.write_report", lambda results: None)  # has a test of its own
    return run


def stored(folder) -> dict:
    return json.loads((folder / "effect" / "olmoe-topics-0.json").read_text())


def test_a_run_writes_each_setting_and_measures_only_what_is_missing(bench, tmp_path):
    assert [MEMORY in line for line in bench(MEMORY)] == [True]
    first = stored(tmp_path)
    assert [ROUTERS in line for line in bench(MEMORY, ROUTERS)] == [True]
    both = stored(tmp_path)
    assert both["settings"][MEMORY] == first["settings"][MEMORY] and list(both["settings"]) == [MEMORY, ROUTERS]
    for entry in both["settings"].values():
        assert set(entry) >= {"group", "commit", "versions", "options", "keeps", "bytes", "build_seconds", "scores"}
        assert entry["reference_tokens"] == 512
        assert [len(found["nll"]) for found in entry["scores"].values()] == [4, 2, 2, 2, 2]
        assert all(found["tokens"] == both["base"][text]["tokens"] for text, found in entry["scores"].items())
        assert entry["scores"]["topics"]["nll"] != both["base"]["topics"]["nll"]
    assert bench(MEMORY, ROUTERS) == []
    assert len(bench(ROUTERS, more=("--fresh",))) == 1


def test_other_options_are_measured_again_and_other_text_is_refused(bench, tmp_path):
    bench(ROUTERS)
    content = stored(tmp_path)
    content["settings"][ROUTERS]["options"]["rate"] = 77
    path = tmp_path / "effect" / "olmoe-topics-0.json"
    path.write_text(json.dumps(content))
    assert len(bench(ROUTERS)) == 1
    with pytest.raises(SystemExit, match="was measured with another model or on other text, at commit"):
        bench(ROUTERS, more=("--references", "3"))
    assert len(bench(ROUTERS, more=("--references", "3", "--fresh"))) == 1
    assert stored(tmp_path)["settings"][ROUTERS]["reference_tokens"] == 768


def test_the_best_rate_on_validation_text_is_taken(bench, tmp_path):
    bench(BIAS, f"{BIAS} at 0.01", f"{BIAS} at 0.03")
    entries = stored(tmp_path)["settings"]
    tried = {float(rate): nll for rate, nll in entries[BIAS]["validation_nll"].items()}
    best = min(tried, key=tried.get)
    assert set(tried) == {0.01, 0.03} and entries[BIAS]["rate"] == best
    assert entries[BIAS]["scores"] == entries[f"{BIAS} at {best:g}"]["scores"]


def test_what_was_measured_on_other_text_is_kept_beside_its_own_scores_of_the_model(bench, tmp_path):
    bench(ROUTERS, MEMORY)
    before = stored(tmp_path)
    assert len(bench(ROUTERS, more=("--references", "3", "--keep"))) == 1
    after = stored(tmp_path)
    assert list(after["settings"]) == [ROUTERS]
    assert [{name: block[name] for name in before if name != "earlier"} for block in after["earlier"]] == [
        {name: value for name, value in before.items() if name != "earlier"}
    ]
    assert bench(ROUTERS, more=("--references", "3")) == []
    entries = entries_of(after)
    assert [entries[name]["earlier"] for name in (ROUTERS, MEMORY)] == [False, True]
    assert entries[MEMORY]["base"] == before["base"] and entries[ROUTERS]["base"] == after["base"]


def test_a_rate_is_trained_once_also_by_another_run(bench, tmp_path, monkeypatch):
    trained = []
    train = run.tuned
    monkeypatch.setattr(run, "tuned", lambda name, *args: trained.append((name, args[-1])) or train(name, *args))
    bench(f"{BIAS} at 0.01")
    bench(BIAS, f"{BIAS} at 0.03")
    assert trained == [(BIAS, 0.01), (BIAS, 0.03)]
    assert stored(tmp_path)["settings"][BIAS]["options"]["rate"] is None


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--settings", "a bigger memory"], "is not a setting: choose among"),
        (["--references", "4"], "are for trials: choose a folder"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(arguments, reason, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert reason in capsys.readouterr().err
