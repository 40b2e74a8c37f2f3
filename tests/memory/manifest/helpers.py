"""The statistics of a calibrated memory, and manifests as older versions of the format have them."""

from dataclasses import replace

from knnmoe_hf import RoutingMemory

STATS = dict(
    reference_mean=0.6,
    background_mean=0.3,
    weight=2.0,
    reference_drift=0.1,
    background_drift=0.05,
    min_warmup=0.25,
    open_shift=-0.2,
    background_open_shift=-0.1,
)


def as_version_5(config: dict) -> None:
    """The manifest without what version 5 did not know."""
    config["memory"]["format_version"] = 5
    del config["memory"]["card_data"]


def as_version_4(config: dict) -> None:
    """The manifest without what version 4 did not know."""
    as_version_5(config)
    config["memory"]["format_version"] = 4
    del config["memory"]["next_tokens"]
    for entry in config["memory"]["layers"]:
        if entry["stats"] is not None:
            del entry["stats"]["background_open_shift"]
    verdict = config["memory"]["verdict"]
    for name in ("recall", "next_token_weight", "next_token_temperature", "next_token_neighbors"):
        if verdict is not None:
            del verdict["settings"][name]
    if config["memory"]["calibration"] is not None:
        del config["memory"]["calibration"]["fits"]


def from_version_4(memory: RoutingMemory) -> RoutingMemory:
    """What a memory is that version 4 has written: no tokens were fitted, and all text was shifted alike."""
    layers = {
        layer: replace(rows, stats=replace(rows.stats, background_open_shift=rows.stats.open_shift))
        for layer, rows in memory.layers.items()
    }
    return replace(memory, layers=layers, calibration=replace(memory.calibration, fits={}))


def as_version_3(config: dict) -> None:
    """The manifest without what version 3 did not know."""
    as_version_4(config)
    config["memory"]["format_version"] = 3
    del config["memory"]["digests"]
    config["memory"]["provenance"].pop()


def as_version_2(config: dict) -> None:
    """The manifest with the names that version 2 wrote, and without what it did not know."""
    as_version_3(config)
    names = {
        "reference_mean": "own",
        "background_mean": "ordinary",
        "open_shift": "fall",
        "reference_drift": "own_drift",
        "background_drift": "ordinary_drift",
        "min_warmup": "least_unseen",
    }
    config["memory"]["format_version"] = 2
    del config["memory"]["calibration"]
    for entry in config["memory"]["layers"]:
        stats = entry.pop("stats")
        entry["levels"] = stats and {names.get(name, name): value for name, value in stats.items()}
