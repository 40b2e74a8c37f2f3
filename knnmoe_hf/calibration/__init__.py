"""Fits the statistics of `confidence="calibrated"`."""

from knnmoe_hf.calibration.calibrate import calibrate
from knnmoe_hf.memory.manifest import CalibrationRecord

__all__ = ["CalibrationRecord", "calibrate"]
