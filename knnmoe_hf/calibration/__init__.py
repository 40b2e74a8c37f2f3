"""Fits the statistics of `confidence=\"calibrated\"`."""
