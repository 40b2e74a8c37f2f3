"""Fits the constants of `confidence=\"calibrated\"`."""

from knnmoe_hf.calibration.calibrate import Calibration, calibrate

__all__ = ["Calibration", "calibrate"]
