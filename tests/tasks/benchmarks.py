"""
Invented questions in the exact form of each benchmark's data set, as local folders.

`datasets` reads `cais/mmlu` from the folder of that name in the working directory, so that the harness's own
configurations are used as they are.
"""

import json
from pathlib import Path

_TOPICS = ["tide tables", "copper roofs", "sparrow song", "bread ovens", "river locks", "paper mills", "goat cheese"]
_ASPECTS = [
    "Which season did the old gardeners of {} prefer for the work that needed most hands",
    "Who first described {} in a letter that was read aloud before a learned society",
    "How is the quality of {} judged by a buyer who has neither time nor instruments",
    "Where do the makers of {} keep what is left over when the market is closed",
    "Why was the trade with {} forbidden for some years by the council of the town",
]


def questions(count: int, start: int = 0) -> list[str]:
    """Questions that have little in common."""
    pairs = [(aspect, topic) for topic in _TOPICS for aspect in _ASPECTS]
    return [f"{aspect.format(topic)}?" for aspect, topic in pairs[start : start + count]]


def choices(number: int) -> list[str]:
    return [f"{word} {number}" for word in ("amber", "birch", "cedar", "dune")]


def write(root: Path, name: str, configs: dict[str, dict[str, list[dict]]]) -> None:
    """A data set of the Hub as a folder: `{configuration: {split: rows}}`."""
    folder = root / name
    listed = []
    for config, splits in configs.items():
        files = []
        for split, rows in splits.items():
            path = folder / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            files.append({"split": split, "path": f"{config}/{split}.jsonl"})
        listed.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': listed})}\n---\n")


def mmlu(root: Path, subjects: list[str]) -> None:
    def rows(texts: list[str], subject: str) -> list[dict]:
        return [
            {"question": text, "subject": subject, "choices": choices(i), "answer": i % 4}
            for i, text in enumerate(texts)
        ]

    def splits(subject: str) -> dict[str, list[dict]]:
        parts = {"dev": questions(5), "validation": questions(4, 5), "test": questions(6, 9)}
        return {split: rows([f"Of {subject}: {text}" for text in texts], subject) for split, texts in parts.items()}

    write(root, "cais/mmlu", {subject: splits(subject) for subject in subjects})


def medqa(root: Path) -> None:
    def rows(texts: list[str]) -> list[dict]:
        return [
            {"id": f"{i}", "sent1": text, "sent2": "", "label": i % 4}
            | {f"ending{place}": choice for place, choice in enumerate(choices(i))}
            for i, text in enumerate(texts)
        ]

    splits = {"train": rows(questions(6)), "validation": rows(questions(2, 6)), "test": rows(questions(4, 8))}
    write(root, "GBaker/MedQA-USMLE-4-options-hf", {"default": splits})


def medmcqa(root: Path) -> None:
    def rows(texts: list[str], answered: bool = True) -> list[dict]:
        return [
            {"id": f"{i}", "question": text, "cop": i % 4 if answered else -1, "choice_type": "single", "exp": "so"}
            | {"subject_name": "Anatomy", "topic_name": "None"}
            | dict(zip(("opa", "opb", "opc", "opd"), choices(i)))
            for i, text in enumerate(texts)
        ]

    splits = {"train": rows(questions(6)), "validation": rows(questions(3, 6)), "test": rows(questions(2, 9), False)}
    write(root, "openlifescienceai/medmcqa", {"default": splits})


def gpqa(root: Path) -> None:
    """Extended holds main, which holds diamond."""

    def row(number: int, text: str) -> dict:
        right, *wrong = choices(number)
        return {"Record ID": f"rec{number}", "Question": text, "Correct Answer": right, "Subdomain": "Physics"} | {
            f"Incorrect Answer {place}": choice for place, choice in enumerate(wrong, start=1)
        }

    rows = [row(number, text) for number, text in enumerate(questions(20))]
    configs = {"gpqa_extended": rows, "gpqa_main": rows[4:], "gpqa_diamond": rows[12:]}
    write(root, "Idavidrein/gpqa", {name: {"train": found} for name, found in configs.items()})


def mbpp(root: Path) -> None:
    def row(number: int) -> dict:
        name = f"add_{number}"
        return {
            "task_id": number,
            "text": f"Write a function for {questions(1, number)[0]}",
            "code": f"def {name}(x):\r\n  return x + {number}",
            "test_list": [f"assert {name}({i}) == {i + number}" for i in range(3)],
            "test_setup_code": "",
            "challenge_test_list": [],
        }

    parts = {"prompt": range(1, 8), "test": range(11, 14), "validation": range(14, 16), "train": range(16, 19)}
    write(
        root, "google-research-datasets/mbpp", {"full": {split: [row(n) for n in ids] for split, ids in parts.items()}}
    )


def supergpqa(root: Path) -> None:
    rows = [
        {
            "uuid": f"{number:032d}",
            "question": text,
            "options": [*choices(number), f"elm {number}"],
            "answer": choices(number)[1],
            "answer_letter": "B",
            "discipline": "Engineering",
            "field": "Civil Engineering",
            "subfield": "Bridges",
            "difficulty": "middle",
            "is_calculation": False,
        }
        for number, text in enumerate(questions(12))
    ]
    write(root, "m-a-p/SuperGPQA", {"default": {"train": rows}})
