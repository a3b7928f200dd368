"""Finds the packages; everything else is in pyproject.toml.

The folders `export` and `calibration` are imported as `qe_edge.export` and `qe_edge.calibration`, which setuptools'
declarative package search cannot express.
"""

from setuptools import find_packages, setup

MAPPED = ("calibration", "export")

setup(
    packages=[
        *find_packages(include=["qe_edge", "qe_edge.*"]),
        *(f"qe_edge.{name}" for room in MAPPED for name in find_packages(include=[room, f"{room}.*"])),
    ]
)
