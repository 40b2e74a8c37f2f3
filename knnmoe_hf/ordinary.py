"""Ordinary text for a calibration when the user gives none: what this machine carries anyway.

It is three kinds of text about software (library sources of Python, C++ headers of torch, descriptions and licences of
installed packages), not a sample of what people write. It tells a memory what text without its domain looks like; text
of the kind that a model will really meet beside the domain tells it better.
"""

from knnmoe_hf.lab.corpus import documents

KINDS = {"python": "train", "headers": "reference", "notices": "reference"}
"""Kinds of text and the split of each, as in `knnmoe_hf.lab.corpus`."""
_WINDOWS, _LENGTH, _SKIPPED = 16, 256, 1000


def ordinary_rows(tokenizer) -> dict[str, list[dict]]:
    """Sixteen windows of 256 tokens of each kind, each from another document, as `prepare_dataset` returns rows."""
    return {kind: _windows(documents(kind, split), tokenizer) for kind, split in KINDS.items()}


def _windows(texts: list[str], tokenizer) -> list[dict]:
    long = [text[_SKIPPED:] for text in texts if len(text) > _SKIPPED + 8 * _LENGTH]  # behind its licence header
    rows = []
    for text in long[:: max(1, len(long) // (2 * _WINDOWS))]:
        ids = tokenizer(text[: 16 * _LENGTH], add_special_tokens=False)["input_ids"][:_LENGTH]
        if len(ids) == _LENGTH and len(rows) < _WINDOWS:
            rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * _LENGTH, "example_id": len(rows)})
    return rows
