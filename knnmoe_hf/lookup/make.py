"""One lookup for each layer of a memory."""

import logging

from knnmoe_hf.lookup import mixing
from knnmoe_hf.lookup.confidence import CalibrationStats, Confidence, InContext, Rbf
from knnmoe_hf.lookup.layer import LayerRows
from knnmoe_hf.lookup.options import RetrievalOptions

logger = logging.getLogger(__name__)


def make_confidences(layers: dict[int, LayerRows], config: RetrievalOptions) -> dict[int, Confidence]:
    """
    The confidence that `config` names, for each layer of a memory in the order of the model's layers.

    `"calibrated"` takes its constants from the memory; one that holds none, or was calibrated for other options,
    falls back to `"context"`, with a warning.
    """
    if config.confidence == "rbf":
        return {layer: Rbf(rows.scale, config.gamma) for layer, rows in layers.items()}
    obstacle = _obstacle(layers, config) if config.confidence == "calibrated" else None
    if obstacle is not None:
        logger.warning(
            "%s: confidence='calibrated' falls back to 'context'; knnmoe_hf.calibrate fits it to ordinary text",
            obstacle,
        )
    fitted, made, before = config.confidence == "calibrated" and obstacle is None, {}, None
    for layer, rows in sorted(layers.items()):
        stats = rows.stats if fitted else reference_stats(rows, config)
        made[layer] = before = InContext(layer, stats, before)
    return made


def _obstacle(layers: dict[int, LayerRows], config: RetrievalOptions) -> str | None:
    for rows in layers.values():
        if rows.stats is None:
            return "the memory holds no calibration"
        if (difference := rows.stats.differs(config)) is not None:
            return f"the memory was calibrated for {difference}"
    return None


def reference_stats(rows: LayerRows, config: RetrievalOptions) -> CalibrationStats:
    """What `"context"` compares with: the references' mean similarity to rows of other examples."""
    own = mixing.similarity(rows.distances, rows.scale, config.gamma).mean().item() if len(rows.distances) else 1.0
    return CalibrationStats(
        reference_mean=max(own, 1e-6),
        background_mean=0.0,
        weight=1.0,
        threshold=float(config.context_threshold),
        width=float(config.context_width),
        scale=rows.scale,
        gamma=float(config.gamma),
        half_life=float(config.half_life),
        num_neighbors=float(config.num_neighbors),
    )
