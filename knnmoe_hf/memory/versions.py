"""Older versions of a memory's manifest, read as the present one."""

from typing import Any

from knnmoe_hf.errors import shown

FORMAT_VERSION = 4
"""
Version 3 names the stats of a calibration otherwise than version 2, and says what a calibration has read. Version 4
adds hashes of n-grams to provenance, and digests of the files beside the tensors.
"""

_STATS_OF_VERSION_2 = {
    "own": "reference_mean",
    "ordinary": "background_mean",
    "fall": "open_shift",
    "own_drift": "reference_drift",
    "ordinary_drift": "background_drift",
    "least_unseen": "min_warmup",
}
"""Names that differ, old to new."""


def in_this_version(content: Any) -> dict:
    """
    The entry `memory` of `config.json` as version 4 writes it.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: if it is of no version that is known.
    """
    version = content["format_version"]
    if type(version) is not int or version not in (2, 3, FORMAT_VERSION):
        raise ValueError(f"format_version {shown(version)} is none of 2, 3 and {FORMAT_VERSION}")
    if version == 2:
        content = _in_version_3(content)
    if version < FORMAT_VERSION:
        kept = content["provenance"]
        content = content | {"digests": {}, "provenance": [*kept, 0] if type(kept) is list else kept}
    return content


def _in_version_3(content: dict) -> dict:
    layers = [{name: value for name, value in entry.items() if name != "levels"} for entry in content["layers"]]
    for entry, old in zip(layers, content["layers"]):
        levels = old["levels"]
        renamed = {_STATS_OF_VERSION_2.get(name, name): value for name, value in (levels or {}).items()}
        entry["stats"] = renamed if levels is not None else None
    return content | {"layers": layers, "calibration": None}
