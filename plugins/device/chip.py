"""Prints the compute capability of the first GPU, for example 87: what the kernels are assembled for."""

from __future__ import annotations

import sys

from device.driver import MAJOR, MINOR, DeviceError, Driver


def chip(driver: Driver) -> int:
    """Compute capability of the first GPU, times 10."""
    device = driver.integer("cuDeviceGet", 0)
    major, minor = (driver.integer("cuDeviceGetAttribute", key, device) for key in (MAJOR, MINOR))
    return 10 * major + minor


if __name__ == "__main__":
    try:
        print(chip(Driver()))
    except DeviceError as error:
        sys.exit(str(error))
