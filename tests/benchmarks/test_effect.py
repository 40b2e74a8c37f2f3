"""The whole bench on a tiny model: what it writes, what it skips, and what it leaves alone."""

import json

import pytest

from benchmarks import memories, texts
from benchmarks.effect import main
from benchmarks.settings import DEFAULT
from knnmoe_hf.lab import LAB_MODELS
from tests.conftest import tiny_model
from tests.support.tokenizers import byte_tokenizer

ROWS = [DEFAULT.name, "router-only"]
WORDS = "the patient was given a dose of the drug and then slept well for the night while it rained".split()


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the bench on a tiny lab with a little text, and returns what it printed of its measurements."""

    def documents(kind: str, split: str) -> list[str]:
        at = sum(map(ord, kind + split))
        return [" ".join(WORDS[(i * 3 + j * j + at) % len(WORDS)] for j in range(60)) for i in range(20)]

    def run(*more: str, rows: tuple = tuple(ROWS)) -> list[str]:
        trial = "--references 2 --test-windows 4 --jobs 1 --labs olmoe --kinds topics --seeds 0".split()
        main([*trial, "--results", str(tmp_path / "results"), "--settings", *rows, *more])
        return [line for line in capture() if line.startswith("olmoe-topics-0")]

    tiny_model("olmoe", vocab_size=260, max_position_embeddings=512).save_pretrained(tmp_path / "lab")
    byte_tokenizer().save_pretrained(tmp_path / "lab")
    monkeypatch.setitem(LAB_MODELS, "olmoe", tmp_path / "lab")
    monkeypatch.setattr(texts, "documents", documents)
    monkeypatch.setattr(memories, "background_rows", lambda tokenizer: {})
    printed: list[str] = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))

    def capture() -> list[str]:
        lines = list(printed)
        printed.clear()
        return lines

    return run


def test_it_writes_the_table_the_raw_numbers_and_the_plots(bench, tmp_path):
    assert len(bench()) == 2
    results = tmp_path / "results"
    table = (results / "effect.md").read_text()
    assert all(f"| {name} |" in table for name in ROWS) and "lab OLMoE" in table
    raw = json.loads((results / "effect" / "olmoe-topics-0.json").read_text())
    assert list(raw) == ROWS
    for entry in raw.values():
        assert set(entry) >= {"group", "options", "versions", "digest", "bytes", "build_seconds", "changes", "scores"}
        assert list(entry["changes"]) == ["topics", "headers", "notices", "python", "tables"]
        assert [len(found["nll"]) for found in entry["scores"].values()] == [4, 2, 2, 2, 2]
        mean, low, high = entry["changes"]["topics"]["nll"]
        assert low <= mean <= high
        assert entry["reference_tokens"] == 512
    frozen = json.loads((results / "effect" / "olmoe.json").read_text())["frozen"]
    assert set(frozen["scores"]) == set(texts.KINDS)
    for name in ("harm", "bytes", "references"):
        assert (results / f"effect-{name}.svg").read_text().lstrip().startswith("<?xml")


def test_a_second_run_measures_only_what_is_missing(bench, tmp_path):
    bench(rows=ROWS[:1])
    before = json.loads((tmp_path / "results" / "effect" / "olmoe-topics-0.json").read_text())
    assert [ROWS[1] in line for line in bench()] == [True]
    after = json.loads((tmp_path / "results" / "effect" / "olmoe-topics-0.json").read_text())
    assert after[ROWS[0]] == before[ROWS[0]]
    assert bench() == []
    assert len(bench("--fresh")) == 2


def test_what_was_measured_with_other_options_is_measured_again(bench, tmp_path):
    bench(rows=ROWS[:1])
    path = tmp_path / "results" / "effect" / "olmoe-topics-0.json"
    assert len(bench("--references", "3", rows=ROWS[:1])) == 1
    assert json.loads(path.read_text())[ROWS[0]]["reference_tokens"] == 768


def test_an_option_that_the_library_no_longer_has_makes_nothing_stale(bench, tmp_path):
    bench(rows=ROWS[:1])
    path = tmp_path / "results" / "effect" / "olmoe-topics-0.json"
    raw = json.loads(path.read_text())
    raw[ROWS[0]]["options"]["config"]["magic"] = 3
    raw["magical"] = raw[ROWS[0]] | {"group": "magic"}
    path.write_text(json.dumps(raw))
    assert bench(rows=ROWS[:1]) == []
    assert "| magical † |" in (tmp_path / "results" / "effect.md").read_text()
    raw[ROWS[0]]["options"]["config"]["gamma"] = 77
    path.write_text(json.dumps(raw))
    assert len(bench(rows=ROWS[:1])) == 1


def test_an_interrupted_run_keeps_what_it_has(bench, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.cells.tuned", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        bench()
    assert list(json.loads((tmp_path / "results" / "effect" / "olmoe-topics-0.json").read_text())) == ROWS[:1]


def test_the_best_rate_on_validation_text_is_taken_and_measured_once(bench, tmp_path):
    bench(rows=("constant bias",))
    raw = json.loads((tmp_path / "results" / "effect" / "olmoe-topics-0.json").read_text())
    tried = {name: entry["validation_nll"] for name, entry in raw.items() if " at " in name}
    assert len(tried) == 2
    best = raw[min(tried, key=tried.get)]
    assert raw["constant bias"]["scores"] == best["scores"] and raw["constant bias"]["digest"] != best["digest"]


def test_the_report_can_be_written_alone(bench, tmp_path):
    bench()
    (tmp_path / "results" / "effect.md").unlink()
    assert bench("--report") == []
    assert (tmp_path / "results" / "effect.md").exists()


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--settings", "a bigger memory"], "is no setting: choose among"),
        (["--references", "4"], "are for trials: say with --results"),
    ],
)
def test_bad_arguments_are_refused_with_the_reason(arguments, reason, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert reason in capsys.readouterr().err
