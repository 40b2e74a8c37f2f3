"""Tests of `knnmoe_hf.comparison`."""
