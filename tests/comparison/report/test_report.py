"""Both pages say what `results.json` says: every number, nothing for what was not measured, and no text as markup."""

import copy
import json
import re
from html.parser import HTMLParser

import pytest

from knnmoe_hf.comparison.report import write_report
from knnmoe_hf.comparison.report.contents import document_of
from knnmoe_hf.comparison.report.results import Results
from knnmoe_hf.pages.document import Cell, Column, Document, Section, Table
from knnmoe_hf.pages.markdown import to_markdown
from knnmoe_hf.pages.numbers import amount, change, score, size
from knnmoe_hf.pages.page import to_html
from tests.comparison.report.results_file import BROKEN, FAILED, METHODS, PENDING, SUBJECTS, content


class Page(HTMLParser):
    """The tables of a page, by title: their rows of (text, data-value); and all its elements."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.elements: list[tuple[str, dict]] = []
        self._title, self._cell = "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.elements.append((tag, given))
        if given.get("role") == "region":
            self._title = given["aria-label"]
            self.tables[self._title] = []
        elif tag == "tr":
            self.tables[self._title].append([])
        elif tag in ("td", "th"):
            self._cell = ["", given.get("data-value")]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[self._title][-1].append(tuple(self._cell))
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell[0] += data


@pytest.fixture(scope="module")
def results():
    return content()


@pytest.fixture(scope="module")
def html(results):
    return to_html(document_of(Results(results)))


@pytest.fixture(scope="module")
def markdown(results):
    return to_markdown(document_of(Results(results)))


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def row_of(results, fitted_on, task, label):
    return next(r for r in results["results"] if (r["fitted_on"], r["task"], r["method"]) == (fitted_on, task, label))


def points(found: dict) -> str:
    return f"{100 * found['mean']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


def test_every_number_of_the_result_tables_is_that_of_the_results(results, page):
    for task in ("lab_topics", "mmlu"):
        header, *rows = page.tables[f"Results on {task}"]
        assert [text for text, _ in header[:4]] == [
            "method",
            "accuracy (acc), %",
            "change against frozen, points",
            "change against knn_moe, points",
        ]
        assert [row[0][0] for row in rows] == list(METHODS)
        for label, cells in zip(METHODS, rows):
            row = row_of(results, task, task, label)
            if row["status"] != "done":
                assert len(cells) == 2
                continue
            metrics, changes, cost = row["metrics"], row["changes"], row["cost"]
            texts = [text for text, _ in cells]
            own = [points(changes[other]["acc"]) if label != other else "itself" for other in ("frozen", "knn_moe")]
            assert texts[1:4] == [f"{100 * metrics['acc']:.1f}", *own]
            assert texts[8:] == [f"{100 * metrics['acc_norm']:.1f}", f"{metrics['loglikelihood']:.3f}"]
            passes = cost["forward"] + cost["backward"]
            assert float(texts[4]) == passes
            assert float(texts[5]) == pytest.approx(cost["seconds"], rel=0.006)
            exact = [float(value) for _, value in cells[4:] if value is not None]
            times = [] if label == "frozen" else [cost["times_frozen"]]
            seconds = [cost["seconds"], *times]
            assert exact == [passes, *seconds, cost["bytes"], metrics["acc_norm"], metrics["loglikelihood"]]
            assert float(cells[1][1]) == metrics["acc"]


def test_the_tables_of_costs_and_other_tasks_too(results, page):
    names = ("forward", "backward", "tokens", "prompt_tokens", "seconds", "times_frozen", "bytes")
    for cells in page.tables["Cost on mmlu"][1:]:
        row = row_of(results, "mmlu", "mmlu", cells[0][0])
        if row["status"] == "done" and row["method"] != "frozen":
            fit = [row["cost"][name] for name in (*names, "fit_seconds", "fit_forward", "fit_backward")]
            assert [float(value) for _, value in cells[1:]] == fit
    for cells in page.tables["Other tasks, with what was fitted on mmlu"][1:]:
        row = row_of(results, "mmlu", "lab_python", cells[0][0])
        if row["status"] == "done" and row["method"] != "frozen":
            assert cells[2][0] == points(row["changes"]["frozen"]["acc"])
            assert float(cells[1][1]) == row["metrics"]["acc"]


def test_all_subjects_are_there_with_their_intervals(results, page):
    header, *rows = page.tables["knn_moe: change by subject on mmlu"]
    groups = row_of(results, "mmlu", "mmlu", "knn_moe")["groups"]
    assert sorted(cells[0][0] for cells in rows) == sorted(SUBJECTS) and len(SUBJECTS) == 57
    assert [title for title in page.tables if "by subject on lab_topics" in title] == []  # which has only one
    assert [float(cells[3][1]) for cells in rows] == sorted((one["change"] for one in groups.values()), reverse=True)
    for cells in rows:
        one = groups[cells[0][0]]
        if one["low"] is None:
            assert cells[3][0] == f"{100 * one['change']:+.1f} [too few items]"
        else:
            assert cells[3][0] == points(one | {"mean": one["change"]})


@pytest.mark.parametrize(
    "label, said",
    [(BROKEN, "broken: it changed no route on any of 8 items"), (FAILED, "failed: the load"), (PENDING, "not run")],
)
def test_what_has_no_results_says_why_and_has_no_numbers(page, html, markdown, label, said):
    found = [row for title, rows in page.tables.items() for row in rows if row and row[0][0] == label]
    for row in found:
        if len(row) == 2:
            assert row[1][0].startswith(said) and row[1][1] is None
    assert sum(len(row) == 2 for row in found) == 6  # results, costs and other tasks, of both tasks
    labels = re.findall(r'class="label[^>]*>([^<]*)<', html)
    assert "knn_moe" in labels and label not in labels
    lines = [line for line in markdown.splitlines() if line.startswith(f"| {label} | {said.split(':')[0]}")]
    assert len(lines) == 6 and not any(re.search(r"\| *[-+]?0(\.0+)? *\|", line) for line in lines)


def test_markdown_has_the_tables_of_the_page(page, markdown):
    lines = markdown.splitlines()
    for title, rows in page.tables.items():
        start = lines.index(f"**{title}**") + 2
        for number, row in enumerate(rows):
            cells = lines[start + number + (number > 0)].strip("| ").replace("\\", "").split(" | ")
            shown = [" ".join(text.split()) for text, _ in row]
            if "as a bar" in rows[0][-1][0]:
                shown = shown[:-1]
            assert [cell.strip(" |") for cell in cells if cell.strip(" |")] == [text for text in shown if text]


def test_in_short_answers_the_questions(results):
    said = to_markdown(document_of(Results(results))).replace("\\", "")
    for task in ("lab_topics", "mmlu"):
        rows = {r["method"]: r for r in results["results"] if (r["fitted_on"], r["task"]) == (task, task)}
        done = {label: row for label, row in rows.items() if row["status"] == "done"}
        better = [
            label for label, row in done.items() if label != "knn_moe" and row["changes"]["knn_moe"]["acc"]["low"] > 0
        ]
        assert f"{task}: better than knn_moe, outside the interval: {', '.join(better) or 'no method'}." in said
        best = max(("knn_moe", "knn_moe_both"), key=lambda label: done[label]["metrics"]["acc"])
        both = [
            label
            for label, row in done.items()
            if not label.startswith("knn_moe")
            and METHODS[label][1]
            and row["metrics"]["acc"] >= done[best]["metrics"]["acc"]
            and (label == "frozen" or row["cost"]["times_frozen"] <= done[best]["cost"]["times_frozen"])
        ]
        assert f"cheap per item as {best}, the best setting of the memory: {', '.join(both) or 'no method'}." in said
        own, against = (points(done["constant_bias"]["changes"][other]["acc"]) for other in ("frozen", "knn_moe"))
        assert f"constant_bias, which retrieves nothing, changes the frozen model by {own} points; against" in said
        assert f"{task}: {BROKEN} changed nothing where it acts and is reported as broken." in said


def test_in_short_answers_the_questions_where_the_memory_changed_nothing(results):
    for row in results["results"]:
        if row["method"] == "knn_moe":
            row |= {"status": "broken", "metrics": {}, "reason": "no route changed"}
    said = to_markdown(document_of(Results(results))).replace("\\", "")
    for task in ("lab_topics", "mmlu"):
        assert f"{task}: better than" not in said
        assert f"{task}: of the methods that keep the weights, at least as good" in said
        assert f"{task}: constant_bias, which retrieves nothing, changes the frozen model by" in said
        assert f"{task}: knn_moe, {BROKEN}" in said or f"{task}: {BROKEN}, knn_moe" in said


def test_a_change_that_is_known_the_other_way_round_is_turned():
    results = content(groups=False)
    frozen, memory = (row_of(results, "mmlu", "mmlu", label) for label in ("frozen", "knn_moe"))
    frozen["changes"] = {}
    memory["changes"]["frozen"]["acc"] = {"mean": 0.05, "low": 0.01, "high": 0.08}
    page = Page(to_html(document_of(Results(results))))
    cells = page.tables["Results on mmlu"][1]
    assert cells[3] == ("-5.0 [-8.0, -1.0]", "-0.05")


HOSTILE = '<img src=x onerror="alert(1)">|`*_[a](http://b)\n</script><script>alert(2)</script> & "\''


def test_text_is_no_markup():
    results = copy.deepcopy(content(groups=False))
    text = json.dumps(results)
    for name in ("knn_lm", "lab_python", "college_1", "arXiv 2604.05267", "lab:olmoe"):
        text = text.replace(json.dumps(name), json.dumps(name + HOSTILE))
    results = json.loads(text)
    results["results"][2]["reason"] = results["name"] = HOSTILE
    document = document_of(Results(results))
    html = to_html(document)
    page = Page(html)
    assert not any(tag == "img" or any(key.startswith("on") for key in given) for tag, given in page.elements)
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert "knn_lm" + HOSTILE in [row[0][0] for row in page.tables["Results on lab_topics"]]
    for line in to_markdown(document).splitlines():
        assert not re.search(r"(?<!\\)[<`]", line), line
        assert not re.search(r"(?<!\\)\]\(", line), line
    rows = [line for line in to_markdown(document).splitlines() if line.startswith("| knn_lm")]
    assert rows and all("onerror" in row for row in rows)


def test_the_page_asks_for_nothing_and_runs_its_own_script_alone(html):
    page = Page(html)
    loading = [
        given for tag, given in page.elements for key in ("src", "href") if not given.get(key, "#").startswith("#")
    ]
    assert loading == [] and "@import" not in html and "url(" not in html
    (policy,) = [given["content"] for tag, given in page.elements if given.get("http-equiv")]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert [given["tabindex"] for tag, given in page.elements if given.get("role") == "region"] == ["0"] * len(
        page.tables
    )


@pytest.mark.parametrize("done", [0, 1, 3, 20])
def test_an_unfinished_comparison_is_shown_too(tmp_path, done):
    results = content(groups=False, complete=False)
    for number, row in enumerate(results["results"]):
        if number >= done:
            row |= {"status": "pending", "metric": None, "metrics": None, "changes": {}, "groups": {}, "cost": None}
            row |= {"effect": None, "reason": None}
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_report(tmp_path)
    html, markdown = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    assert "is not finished" in html and "is not finished" in markdown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md", "results.json"]
    shown = Page(html).tables["Results on lab_topics"]
    assert sum(row[1][0] == "not run yet" for row in shown[1:]) >= 16 - done


def test_an_empty_or_spoilt_file_is_told(tmp_path):
    assert "There are no results yet." in to_html(document_of(Results({})))
    (tmp_path / "results.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="is no JSON"):
        write_report(tmp_path)
    (tmp_path / "results.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="holds no JSON object"):
        write_report(tmp_path)


def test_numbers_as_they_are_shown():
    assert score(None, "acc").text == change(None, "acc").text == amount(None).text == size(None).text == "n/a"
    assert score(0.62345, "acc").text == "62.3" and score(-12.3456, "loglikelihood").text == "-12.346"
    assert (
        score(0.5, "exact_match,flexible-extract").text
        == score(0.5, "pass@1").text
        == score(0.5, "no_answer").text
        == "50.0"
    )
    sure = change({"mean": 0.05, "low": 0.01, "high": 0.09}, "acc")
    assert sure == Cell("+5.0 [+1.0, +9.0]", 0.05, "good")
    assert change({"mean": -0.05, "low": -0.09, "high": -0.01}, "acc").tone == "bad"
    assert change({"mean": 0.05, "low": -0.01, "high": 0.09}, "acc").tone == ""
    assert change({"mean": 0.05, "low": None, "high": None}, "acc").text == "+5.0 [too few items]"
    assert [amount(value).text for value in (0, 4.0, 0.05123, 1234.5, 1.24e-5)] == [
        "0",
        "4",
        "0.0512",
        "1,234",
        "1.24e-05",
    ]
    assert [size(value).text for value in (0, 999, 1000, 77_345_678)] == ["0 B", "999 B", "1 kB", "77.3 MB"]


def test_any_document_can_be_a_page():
    table = Table("T", [Column("a", is_number=False), Column("b")], [[Cell("x"), Cell("1.0", 1.04)]], "a note")
    document = Document("Title", "lead", [Section("S", [table])], "the end", ["take care"])
    assert Page(to_html(document)).tables == {"T": [[("a", None), ("b", None)], [("x", None), ("1.0", "1.04")]]}
    assert "| x | 1.0 |" in to_markdown(document) and "**take care**" in to_markdown(document)
