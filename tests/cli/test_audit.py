"""`knnmoe info --audit`: figures and findings in words and as JSON, and a command that takes hostile rows out."""

import json
import re
import shlex
from dataclasses import replace

import pytest

from knnmoe_hf import RoutingMemory
from knnmoe_hf.cli import main
from tests.cli.helpers import one_error
from tests.memory.audit.poison import KINDS
from tests.memory.audit.test_audit import honest
from tests.memory.helpers import full_memory
from tests.support.models import tiny_model


@pytest.fixture(scope="module")
def hostile() -> RoutingMemory:
    """In examples 2 and 5, keys that attract every query, and values for one expert."""
    memory = honest("default")
    places = ((memory.provenance.example_ids == 2) | (memory.provenance.example_ids == 5)).nonzero()[:, 0]
    poison = KINDS["keys at the centre, one expert"]
    return replace(memory, layers={layer: poison(rows, places, None) for layer, rows in memory.layers.items()})


def test_an_honest_memory_has_nothing_suspicious(tmp_path, capsys):
    honest("default").save_pretrained(tmp_path, provenance="ids")
    assert main(["info", str(tmp_path), "--audit"]) == 0
    shown = capsys.readouterr().out
    assert "nothing suspicious in 1,152 rows" in shown and "SUSPICIOUS" not in shown
    for layer in (1, 2):
        assert re.search(rf"layer {layer}: a row attracts \d+\.\d% of queries at most", shown)
    assert main(["info", str(tmp_path)]) == 0
    assert "audit, without the base model" not in capsys.readouterr().out


def test_hostile_rows_are_named_and_the_command_that_is_printed_removes_them(hostile, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile.save_pretrained("a memory")
    assert main(["info", "a memory", "--audit"]) == 0
    shown = capsys.readouterr().out
    assert (
        "SUSPICIOUS: 128 of 1,152 rows" in shown
        and "examples with suspicious rows (how many): 2 (64), 5 (64)" in shown
    )
    assert "(attracting_keys)" in shown and "(far_values)" in shown
    (command,) = re.findall(r"^take them out: (knnmoe remove .*)$", shown, re.MULTILINE)
    assert main(shlex.split(command)[1:]) == 0
    capsys.readouterr()
    assert main(["info", "a memory-cleaned", "--audit"]) == 0
    assert "nothing suspicious in 1,024 rows" in capsys.readouterr().out


def test_an_audit_as_json(hostile, tmp_path, capsys):
    hostile.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--audit", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["audit"]
    assert (found["rows"], found["suspicious_rows"], found["examples"]) == (1152, 128, {"2": 64, "5": 64})
    assert set(found["layers"]) == {"1", "2"} and found["layers"]["1"]["most_attracting"] > 0.25
    assert {finding["check"] for finding in found["findings"]} >= {"attracting_keys", "far_values"}
    assert all(finding["rows"] == 128 or finding["rows"] > 0 for finding in found["findings"])


def test_rows_that_cannot_be_removed_are_said_to_be_so(hostile, tmp_path, capsys):
    hostile.save_pretrained(tmp_path, provenance="none")
    assert main(["info", str(tmp_path), "--audit"]) == 0
    shown = capsys.readouterr().out
    assert "cannot be removed: do not attach it" in shown and "knnmoe remove" not in shown


def test_what_is_not_in_single_rows_is_not_mended_by_removing_some(tmp_path, capsys):
    memory = honest("default")
    replace(memory, config=type(memory.config).from_dict(memory.config.saved() | {"gamma": 0.0})).save_pretrained(
        tmp_path
    )
    assert main(["info", str(tmp_path), "--audit"]) == 0
    shown = capsys.readouterr().out
    assert "(opens_everywhere)" in shown and "do not attach this memory" in shown


def test_a_few_rows_tell_nothing(tmp_path, capsys):
    full_memory(tiny_model("olmoe"), examples=(0,)).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--audit"]) == 0
    assert "10 rows are too few to tell anything from" in capsys.readouterr().out


def test_a_plan_has_no_rows_to_audit(capsys):
    with pytest.raises(SystemExit):
        main(["info", "--plan", "allenai/OLMoE-1B-7B-0924", "--audit"])
    assert "--audit looks at rows" in one_error(capsys.readouterr(), "info")
