"""Calibration data, and the statistics that are measured on them."""
