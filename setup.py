"""Finds the packages; everything else is in pyproject.toml.

The folders `export`, `calibration` and `plugins/prepack` are parts of `qe_edge` through links in `qe_edge/`, which the
search follows. `plugins` itself is no package, and travels as `qe_edge/plugin_sources`: its C++ and CUDA.
"""

from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

LIBRARY = Path(__file__).parent / "qe_edge/lib/libqe_plugin.so"


class PlatformWheel(bdist_wheel):
    """A wheel that carries the compiled plugin is for one platform, and still for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform tag."""
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if LIBRARY.exists() else (python, abi, platform)


class PlatformDistribution(Distribution):
    """Tells setuptools whether anything in the wheel was compiled."""

    def has_ext_modules(self) -> bool:
        """Whether the compiled plugin travels along."""
        return LIBRARY.exists()


setup(
    distclass=PlatformDistribution,
    cmdclass={"bdist_wheel": PlatformWheel},
    packages=[*find_packages(include=["qe_edge", "qe_edge.*"]), "qe_edge.plugin_sources"],
)
