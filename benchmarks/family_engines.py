"""The model zoo as engines: every family's graphs built with TensorRT-RTX and the plugin, on a machine without a GPU.

    qe-edge build-plugin -o out/plugin
    python benchmarks/family_engines.py --plugin-library out/plugin/libqe_plugin.so [--models "gemma 2" dinov2 ...]

Every model is transformers' own class with small random weights, the one of the family's tests. It is quantized (round
to nearest, W4A8, all parts), exported and built as `qe-edge build --target rtx --plugin` does. A number is how many
layers of an engine the plugin runs, as the built engine itself lists them; layers that read the same input are one. A
model that the target refuses has the reason instead. The engines do not run: that needs a GPU. Needs the extras `dev`
and `rtx`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from families import Write, seeing_models

from qe_edge.export.build import build_engines
from qe_edge.export.exporter import export_model
from qe_edge.models import Sample
from qe_edge.models.quantized import save_quantized
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import MODULES, make_recipe
from qe_edge.runtime.engine_info import read_engine_info
from qe_edge.system.errors import TargetError
from tests.models import pi0_models, test_decoders, test_vision_encoders
from tests.models.conversations import noise
from tests.models.families import GROUPS, SAMPLES

HEADER = "| model | layers on the plugin: visual, merger, language, action |\n| --- | --- |"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model: Which architecture.
        layers: Layers of each engine that the plugin runs, by graph.
        whole: Whether these are all quantized layers of the engines.
        refused: What the build refuses; empty where there are engines.
    """

    model: str
    layers: dict[str, int]
    whole: bool
    refused: str = ""


def main() -> None:
    """Print a Markdown table and a line of JSON."""
    models = all_models()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plugin-library", type=Path, required=True, help="that qe-edge build-plugin wrote")
    parser.add_argument("--models", nargs="+", choices=list(models), default=list(models))
    arguments = parser.parse_args()
    print(HEADER)
    rows = []
    for name in arguments.models:
        write, modules, samples = models[name]
        with tempfile.TemporaryDirectory() as scratch:
            try:
                rows.append(build(name, write, modules, samples, Path(scratch), arguments.plugin_library))
            except TargetError as error:
                rows.append(Row(name, {}, whole=True, refused=str(error)))
        print(line(rows[-1]), flush=True)
    print(json.dumps([asdict(row) for row in rows]))


def line(row: Row) -> str:
    """A line of the table."""
    if row.refused:
        return f"| {row.model} | refused: {row.refused} |"
    graphs = ("visual", "merger", "prefix", "action") if "action" in row.layers else GROUPS
    counts = ", ".join(str(row.layers.get(graph) or "-") for graph in graphs)
    return f"| {row.model} | {counts}{'' if row.whole else ', others beside'} |"


def all_models() -> dict[str, tuple[Write, tuple[str, ...], list[Sample]]]:
    """By name what writes a model into a folder, its parts, and samples to quantize it with."""
    found: dict[str, tuple[Write, tuple[str, ...], list[Sample]]] = {
        name: (write, tuple(group for group in GROUPS if (name, group) != ("gemma3", "merger")), SAMPLES[:2])
        for _, name, write in seeing_models()
    }
    for name, (family, changes) in test_decoders.MODELS.items():
        found[name] = (partial(_decoder, family, changes), ("language",), test_decoders.TEXTS)
    for family in test_vision_encoders.MODELS:
        pictures = [Sample(noise(width, 60), "") for width in (40, 64)]
        found[family] = (partial(_encoder, family), ("visual",), pictures)
    found["pi0"] = (pi0_models.write, MODULES, pi0_models.CALIBRATION)
    return found


def build(
    name: str, write: Write, modules: tuple[str, ...], samples: list[Sample], scratch: Path, library: Path
) -> Row:
    """Quantize, export and build one model.

    Raises:
        TargetError: If TensorRT-RTX or the plugin refuses a graph.
    """
    recipe = make_recipe(method="rtn", scheme="w4a8", modules=modules)
    save_quantized(*quantize(str(write(scratch / "model")), recipe, samples), scratch / "checkpoint")
    export_model(scratch / "checkpoint", scratch / "onnx")
    build_engines(scratch / "onnx", scratch / "engines", "rtx", plugin_library=library)
    info = read_engine_info(scratch / "engines")
    if info is None:
        raise TargetError("No engine was built.", "Look at the messages above.")
    layers = {graph: len(built.plugin_layers) for graph, built in info.graphs.items()}
    products = [kind for built in info.graphs.values() if built.precision for kind in built.precision.products.values()]
    whole = not any(kind.startswith("int4 weights, float") for kind in products)
    return Row(name, layers, whole)


def _decoder(family: str, changes: dict[str, object], folder: Path) -> Path:
    return test_decoders.write(folder, family, **changes)


def _encoder(family: str, folder: Path) -> Path:
    return test_vision_encoders.write(folder, family)


if __name__ == "__main__":
    main()
