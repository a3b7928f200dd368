"""Hashes of what fixed recipes make of the demo: equal before and after a change that is to change nothing.

    python benchmarks/same_result.py > before.json
    python benchmarks/same_result.py --compare before.json

One thread, so that sums are made in one order. Every file of a checkpoint and of its graphs is hashed but `run.json`,
`files.json` and `manifest.json`, which hold versions and hashes of the others. `recipe.json` differs where options got
other names. The exit code is 1 where a file differs. Takes 80 s of one core of an AMD EPYC.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from qe_edge.export.exporter import export_model
from qe_edge.quantization.folder import quantize_to_folder
from qe_edge.quantization.job import make_job
from qe_edge.recipes.recipe import Recipe, make_recipe
from qe_edge.system.digests import folder_digests

MODULES = ("language", "visual", "merger")
RECIPES = {
    "qe w4a8": make_recipe(modules=MODULES, calibration={"samples": 16}),
    "qe, 4.25 bits": make_recipe(modules=MODULES, calibration={"samples": 16}, budget={"bits": 4.25}),
    "gptq w3a8, sequential": make_recipe(method="gptq", scheme="w3a8", flow="sequential", calibration={"samples": 8}),
    "aser w4a6": make_recipe(method="aser", scheme="w4a6", calibration={"samples": 8}),
}
VOLATILE = ("run.json", "files.json", "manifest.json")


def hashes(recipe: Recipe, folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the checkpoint and of its graphs, by name."""
    quantize_to_folder(make_job("demo", recipe), folder / "checkpoint")
    export_model(folder / "checkpoint", folder / "onnx")
    return {name: found.sha256 for name, found in folder_digests(folder).items() if Path(name).name not in VOLATILE}


def main() -> int:
    """Print the hashes, or what differs from earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=Path, metavar="FILE", help="what this script printed before")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = hashes(recipe, Path(folder))
    if options.compare is None:
        print(json.dumps(found, indent=1))
        return 0
    before = json.loads(options.compare.read_text(encoding="utf-8"))
    different = [
        f"{name}: {file}"
        for name in found.keys() | before.keys()
        for file in found.get(name, {}).keys() | before.get(name, {}).keys()
        if found.get(name, {}).get(file) != before.get(name, {}).get(file)
    ]
    print("\n".join(sorted(different)) or f"All {sum(map(len, found.values()))} files are the same.")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
