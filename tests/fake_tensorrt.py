"""A module `tensorrt` for child processes, which knows plugin libraries that are text files.

The first word of a library is the layout of weights that it reads; "crash" ends the process, "broken" cannot be loaded.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qe_edge.prepack.lower import LAYOUT_VERSION

SOURCE = """
import os
import sys
from pathlib import Path
from types import SimpleNamespace

__version__ = "10.7"
PluginField = lambda name, value, kind: (name, int(value[0]))
PluginFieldCollection = dict
PluginFieldType = SimpleNamespace(INT32=0)
TensorRTPhase = SimpleNamespace(BUILD=0)


class Creator:
    def __init__(self, layout):
        self.layout = layout

    def create_plugin(self, name, fields, phase):
        reasons = {
            "An attribute is unknown. Lower again.": self.layout is None,
            "The weights have another layout version. Lower again.": fields["layout_version"] != self.layout,
            "in_features is not a multiple of 8. Keep this layer in 16 bits.": fields["in_features"] % 8,
            "out_features is not a multiple of 8. Keep this layer in 16 bits.": fields["out_features"] % 8,
            "A rank is outside 0 to 128. Use a smaller rank.": fields["rank_shared"] > 128,
            "group_size is 32.": fields["group_size"] == 32,
        }
        for reason, applies in reasons.items():
            if applies:
                print("[E] QELinear: " + reason, file=sys.stderr)
                return None
        return object()


class Registry:
    creator = None

    def get_creator(self, name, version, namespace):
        return self.creator

    def load_library(self, path):
        word = Path(path).read_text().split()[0]
        if word == "crash":
            os.abort()
        if word == "broken":
            raise RuntimeError("no such symbol")
        Registry.creator = Creator(None if word == "old" else int(word))


get_plugin_registry = Registry
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes find the module, and every target can be built."""
    (folder / "tensorrt.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr("qe_edge.export.targets.Target.build_problem", lambda _target: None)


def library(folder: Path, word: object = LAYOUT_VERSION) -> Path:
    """A plugin library, of the present layout unless `word` says something else."""
    path = folder / "libqe_plugin.so"
    path.write_text(f"{word}\n", encoding="utf-8")
    return path
