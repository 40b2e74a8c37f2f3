"""Text that every machine with this library carries, by kind and split, for the lab models.

Nothing of it is shipped: it is read at run time from the running interpreter's own standard library and from the
packages that are installed beside this one, so the last two kinds change with their versions.

| kind     | what                                                        | splits                                |
|----------|-------------------------------------------------------------|---------------------------------------|
| python   | library sources, without tests and the two kinds below      | `train`, `test` (one file in twenty)  |
| tables   | the character tables of `encodings`                         | `train`, `test` (one file in ten)     |
| topics   | the English of `pydoc_data.topics`, never trained on        | `reference`, `test` (by topic)        |
| headers  | the C++ of torch's own headers, never trained on            | `reference`, `test` (by file)         |
| notices  | descriptions and licences of packages, never trained on     | `reference`, `test` (by file)         |
"""

import hashlib
import importlib.metadata
import importlib.util
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

SPLITS = {
    "python": ("train", "test"),
    "tables": ("train", "test"),
    "topics": ("reference", "test"),
    "headers": ("reference", "test"),
    "notices": ("reference", "test"),
}
_TEST_SHARE = {"python": 20, "tables": 10}  # one file in so many
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}
_REFERENCE_SHARE = 0.55  # of the characters of `topics`, of the files of the installed kinds
_PHRASE, _QUOTED_SHARE = 8, 0.2  # words; of a paragraph's phrases, so many may be in other files too
_HEADER_FOLDERS = ("c10", "torch/csrc")


def documents(kind: str, split: str) -> list[str]:
    """The texts of one kind and split, in an order that depends on nothing but the installed library.

    Raises:
        ValueError: for a kind or split that does not exist.
    """
    if kind not in SPLITS or split not in SPLITS[kind]:
        known = ", ".join(f"{k}/{s}" for k, splits in SPLITS.items() for s in splits)
        raise ValueError(f"{f'{kind}/{split}'[:80]!r} is no text of the lab: choose one of {known}.")
    if kind == "topics":
        return _topics(split)
    if kind in ("headers", "notices"):
        return _installed(kind, split)
    return [text for path, text in _sources(kind) if (_digest(path) % _TEST_SHARE[kind] == 0) == (split == "test")]


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _sources(kind: str) -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        if (relative.parts[0] == "encodings") == (kind == "tables"):
            yield relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def _installed(kind: str, split: str) -> list[str]:
    """Files by split, in an order that mixes folders; a paragraph that other files have too is left out everywhere."""
    files = sorted(_headers() if kind == "headers" else _notices(), key=lambda file: _digest(file[0]))
    paragraphs = [{part: _phrases(part) for part in re.split(r"\n\s*\n", text)} for _, text in files]
    holders = Counter(phrase for parts in paragraphs for phrase in set().union(*parts.values()))

    def is_own(phrases: set[int]) -> bool:
        return sum(holders[phrase] > 1 for phrase in phrases) <= _QUOTED_SHARE * len(phrases)

    texts = ["\n\n".join(part for part, phrases in parts.items() if is_own(phrases)) for parts in paragraphs]
    border = round(_REFERENCE_SHARE * len(texts))
    return [text for text in (texts[:border] if split == "reference" else texts[border:]) if text.strip()]


def _phrases(paragraph: str) -> set[int]:
    """Hashes of its runs of words, however its lines are broken: a licence is wrapped anew by everyone."""
    words = paragraph.split()
    runs = range(max(1, len(words) - _PHRASE + 1))
    return {hash(tuple(words[i : i + _PHRASE])) for i in runs}  # equal only for equal runs, whatever the process


def _headers() -> Iterator[tuple[str, str]]:
    root = Path(importlib.util.find_spec("torch").origin).parent / "include"
    for folder in _HEADER_FOLDERS:
        for path in (root / folder).rglob("*.h"):
            yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8", errors="replace")


def _notices() -> Iterator[tuple[str, str]]:
    for package in importlib.metadata.distributions():
        for file in package.files or ():
            if file.name == "METADATA" or ("licen" in file.name.lower() and ".dist-info" in str(file)):
                path = Path(package.locate_file(file))
                if path.suffix != ".py" and path.is_file():
                    yield file.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def _topics(split: str) -> list[str]:
    """Topics by split; those that quote each other stay together, and no paragraph comes twice."""
    from pydoc_data.topics import topics

    paragraphs = {name: re.split(r"\n\s*\n", text) for name, text in sorted(topics.items())}
    group, owner = {name: name for name in paragraphs}, {}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    kept = {name: [] for name in paragraphs}
    for name, parts in paragraphs.items():
        for part in parts:
            first = owner.setdefault(part.strip(), name)
            if first == name:
                kept[name].append(part)
            elif len(part) >= 60:  # shorter ones ("See also") are no quotation
                group[root(name)] = root(first)
    texts = {name: "\n\n".join(parts) for name, parts in kept.items()}
    groups = sorted({root(name) for name in texts}, key=_digest)
    budget, reference = _REFERENCE_SHARE * sum(map(len, texts.values())), set()
    for candidate in groups:
        if budget > 0:
            reference.add(candidate)
            budget -= sum(len(text) for name, text in texts.items() if root(name) == candidate)
    return [
        text for name, text in texts.items() if text.strip() and (root(name) in reference) == (split == "reference")
    ]


def windows(texts: list[str], tokenizer, length: int = 256, limit: int | None = None) -> list[list[int]]:
    """Token ids of `texts`, joined by the end-of-text token and cut into full windows.

    Args:
        texts: documents.
        tokenizer: a transformers tokenizer; texts are joined without a mark if it has no end-of-text token.
        length: tokens per window.
        limit: at most so many windows, the first ones.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        stream += ids + end
        if limit is not None and len(stream) >= limit * length:
            break
    count = len(stream) // length if limit is None else min(limit, len(stream) // length)
    return [stream[i * length : (i + 1) * length] for i in range(count)]
