"""Older versions of a memory's manifest, read as the present one."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knnmoe_hf.errors import shown
from knnmoe_hf.memory.plain_files import unusable
from knnmoe_hf.version import __version__

OLDEST_VERSION = 2
"""That is still read; 0.1.0 wrote it."""
FORMAT_VERSION = 6
"""
Version 3 names the stats of a calibration otherwise than version 2, and says what a calibration has read. Version 4
adds hashes of n-grams to provenance, and digests of the files beside the tensors. Version 5 may hold the token that
follows each row; its verdict says what of the model the memory changed, and its calibration fits that too. Version 6
holds what the card says (`card_data`), and what a calibration expects at each threshold.
"""

_RELEASE = re.compile(r"[0-9A-Za-z.+!-]{1,40}")
_STATS_OF_VERSION_2 = {
    "own": "reference_mean",
    "ordinary": "background_mean",
    "fall": "open_shift",
    "own_drift": "reference_drift",
    "ordinary_drift": "background_drift",
    "least_unseen": "min_warmup",
}
"""Names that differ, old to new."""
_FIRST_OF_VERSION_2 = {"own", "ordinary", "weight", "threshold", "width"}
_WITH_DRIFT = _FIRST_OF_VERSION_2 | {"own_drift", "ordinary_drift", "fall"}
_INCOMPLETE_IN_VERSION_2 = (_FIRST_OF_VERSION_2, _WITH_DRIFT)
"""
Names of the first writers of version 2, which did not record the options that a calibration was made with. Without
these it cannot be used: such a memory opens as one that was not calibrated.
"""

_RECALL_OF_VERSION_4 = {
    "recall": "routing",
    "next_token_weight": None,
    "next_token_temperature": None,
    "next_token_neighbors": None,
}


def check_version(content: Any, path: Path) -> None:
    """
    Checks that the entry `memory` of `config.json` is in a format that this version reads.

    Args:
        content: of the entry.
        path: of the file, for the error.

    Raises:
        MemoryFileError: naming the version of this library that is needed.
    """
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is not int:
        raise unusable(path, f"its entry `memory` has the format_version {shown(version)}, which is not a version")
    known = f"format_version {shown(version)} where knnmoe_hf {__version__} reads {OLDEST_VERSION} to {FORMAT_VERSION}"
    if version > FORMAT_VERSION:
        libraries = content.get("library_versions")
        wrote = libraries.get("knnmoe_hf") if isinstance(libraries, dict) else None
        needed = f"knnmoe_hf {wrote}" if isinstance(wrote, str) and _RELEASE.fullmatch(wrote) else "the version"
        raise unusable(path, f"it has {known}", f"install {needed} that wrote it, or a later one")
    if version < OLDEST_VERSION:
        raise unusable(path, f"it has {known}", "build the memory anew")


def in_this_version(content: Any) -> dict:
    """
    The entry `memory` of `config.json` as version 6 writes it.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: if it is of another form than its version has.
    """
    version = content["format_version"]
    if version == 2:
        content = _in_version_3(content)
    if version < 4:
        kept = content["provenance"]
        content = content | {"digests": {}, "provenance": [*kept, 0] if type(kept) is list else kept}
    content = _in_version_5(content) if version < 5 else content
    return _in_version_6(content) if version < 6 else content


def _in_version_3(content: dict) -> dict:
    layers = [{name: value for name, value in entry.items() if name != "levels"} for entry in content["layers"]]
    for entry, old in zip(layers, content["layers"]):
        levels = old["levels"]
        entry["stats"] = _stats_in_version_3(levels) if levels is not None else None
    return content | {"layers": layers, "calibration": None}


def _stats_in_version_3(levels: dict) -> dict | None:
    if set(levels) in _INCOMPLETE_IN_VERSION_2:
        return None
    return {"min_warmup": 0.0} | {_STATS_OF_VERSION_2.get(name, name): value for name, value in levels.items()}


def _in_version_5(content: dict) -> dict:
    """
    What was measured and fitted before was with `recall="routing"`, the only one that there was, and with one
    `open_shift` for all text.
    """
    verdict, calibration = content.get("verdict"), content["calibration"]
    if verdict and verdict["settings"]:
        verdict = verdict | {"settings": _RECALL_OF_VERSION_4 | verdict["settings"]}
    if calibration is not None:
        calibration = calibration | {"fits": {}}
    layers = [entry | {"stats": _stats_in_version_5(entry["stats"])} for entry in content["layers"]]
    return content | {"next_tokens": False, "verdict": verdict, "calibration": calibration, "layers": layers}


def _in_version_6(content: dict) -> dict:
    calibration = content["calibration"]
    return content | {
        "card_data": None,
        "calibration": calibration if calibration is None else calibration | {"sweep": []},
    }


def _stats_in_version_5(stats: dict | None) -> dict | None:
    return stats if stats is None else stats | {"background_open_shift": stats["open_shift"]}


def optional_tensors(version: int, names: Iterable[str]) -> set[str]:
    """Those of the tensors that a memory of this version may lack: the first writers of version 2 stored no means."""
    return {name for name in names if version == 2 and name.endswith(".encoder.mean")}


def with_means(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with the means that are missing: the input within an encoder's axes that it takes to 0."""
    found = dict(tensors)
    for name, weight in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last == "weight" and f"{prefix}.mean" not in tensors:
            found[f"{prefix}.mean"] = -(torch.linalg.pinv(weight) @ tensors[f"{prefix}.bias"])
    return found
