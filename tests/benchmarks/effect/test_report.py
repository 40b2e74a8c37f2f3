"""The page and the pictures."""

import json

from benchmarks.effect.figures import load_cells
from benchmarks.effect.pictures import write_pictures
from benchmarks.effect.report import write_report
from benchmarks.effect.settings import DEFAULT
from benchmarks.texts import KINDS


def cell(change: float) -> dict:
    def scores(shift: float) -> dict:
        return {
            kind: {
                "nll": [100.0 * window + shift for window in range(5, 10)],
                "hits": [50 + window for window in range(5)],
                "tokens": [255] * 5,
            }
            for kind in KINDS
        }

    entry = {"commit": "abc1234", "versions": {"torch": "2"}, "options": {}, "keeps": True, "bytes": 1000}
    entry |= {"build_seconds": 3.0, "reference_tokens": 512, "scores": scores(255 * change)}
    settings = {DEFAULT.name: entry | {"group": "the memory"}, "gone": entry | {"group": "confidence"}}
    return {"inputs": "x", "commit": "abc1234", "base": scores(0.0), "settings": settings}


def test_the_report_says_what_was_measured_and_at_which_commit(tmp_path):
    (tmp_path / "effect").mkdir()
    (tmp_path / "effect" / "olmoe-topics-0.json").write_text(json.dumps(cell(-0.1)))
    (tmp_path / "effect" / "olmoe-headers-0.json").write_text(json.dumps(cell(-0.3)))
    write_report(tmp_path)
    page = (tmp_path / "effect.md").read_text()
    side_by_side, every, by_kind = page.split("\n## ")[1:]
    assert f"| {DEFAULT.name} | -0.2000 [-0.2000, -0.2000] | +0.00" in side_by_side
    assert f"| {DEFAULT.name} | -0.1000 [-0.1000, -0.1000] |" in every and "| gone † |" in every
    assert "-0.1000 [-0.1000, -0.1000], off -0.1000 | -0.3000 [-0.3000, -0.3000], off -0.3000 |" in by_kind
    assert "abc1234" in page and "COMMITS" not in page
    for name in ("harm", "bytes", "references"):
        assert (tmp_path / f"effect-{name}.svg").read_text().lstrip().startswith("<?xml")
    again = (tmp_path / "effect-bytes.svg").read_bytes()
    write_pictures(tmp_path, load_cells(tmp_path / "effect"))
    assert (tmp_path / "effect-bytes.svg").read_bytes() == again
    shown = (tmp_path / "effect.html").read_text()
    assert f"{DEFAULT.name}: gain 0.2 nats per token" in shown and "-0.200 [-0.200, -0.200]" in shown


def test_what_was_measured_on_earlier_text_or_on_fewer_cells_is_marked(tmp_path):
    (tmp_path / "effect").mkdir()
    now, before = cell(-0.1), cell(-0.5)
    del now["settings"]["gone"]
    before["settings"]["router-only"] = before["settings"].pop("gone") | {"group": "competitors"}
    (tmp_path / "effect" / "olmoe-topics-0.json").write_text(json.dumps(now | {"earlier": [before]}))
    (tmp_path / "effect" / "olmoe-headers-0.json").write_text(json.dumps(now))
    write_report(tmp_path)
    side_by_side = (tmp_path / "effect.md").read_text().split("\n## ")[1]
    assert f"| {DEFAULT.name} | -0.1000" in side_by_side
    assert "| router-only ‡ (1 of 2 cells) | -0.5000" in side_by_side
    shown = (tmp_path / "effect.html").read_text()  # whose means are side by side with nothing said about them
    assert DEFAULT.name in shown and "router-only" not in shown
