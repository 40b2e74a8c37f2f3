"""The page of the routing rules."""

import json

from benchmarks.effect.families import RULES, write_page
from benchmarks.effect.report import write_report
from knnmoe_hf.lab import LAB_MODELS
from tests.benchmarks.effect.test_report import cell


def test_the_page_has_a_row_for_each_lab_model_that_was_measured(tmp_path):
    (tmp_path / "effect").mkdir()
    for name, change in (("deepseek_v3-topics-0", -0.1), ("deepseek_v3-topics-1", -0.3), ("olmoe-topics-0", 0.2)):
        (tmp_path / "effect" / f"{name}.json").write_text(json.dumps(cell(change)))
    (tmp_path / "effect" / "olmoe-headers-0.json").write_text(json.dumps(cell(-0.7)))  # not the kind of the page
    write_page(tmp_path)
    page = (tmp_path / "families.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert "abc1234" in page and "COMMITS" not in page
    assert [row.split("`")[1] for row in rows] == ["olmoe", "deepseek_v3"]
    assert (
        "| sigmoid, bias for the choice, 2 groups" in rows[1] and "| 2 | 2.745 | 2.545 | -0.2000 [-0.2000" in rows[1]
    )
    assert "| 1 | 2.745 | 2.945 | +0.2000 [+0.2000, +0.2000] | +0.00 [+0.00, +0.00] | +0.2000" in rows[0]


def test_the_page_of_all_settings_is_of_the_three_lab_models_that_have_them(tmp_path):
    (tmp_path / "effect").mkdir()
    for lab in ("olmoe", "deepseek_v3"):
        (tmp_path / "effect" / f"{lab}-topics-0.json").write_text(json.dumps(cell(-0.1)))
    write_report(tmp_path)
    page = (tmp_path / "effect.md").read_text()
    assert "lab OLMoE" in page and "deepseek" not in page.lower()


def test_every_lab_model_has_its_rule_in_words():
    assert set(RULES) == set(LAB_MODELS) and len(set(RULES.values())) == len(RULES)
