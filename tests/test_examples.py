"""Every example runs and says what it promises; the last one is a package whose method we have never seen."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))
OWN = ROOT / "examples/07_own_method"
SAYS = {
    "01": r"rtn: .*%.*\n +gptq: .*%.*\n +qe: \d\.\d\d% error",
    "02": r"\nqe .*e-0\d",
    "03": r"matrix have 3\.[67]\d bits per weight",
    "04": r"language\.onnx.*\n(.*\(right: .*\)\n){4}",
    "05": r"\? \w+\n.*\? \w+\n.*\? \w+\n",
    "06": r"to (100|9\d)% of the questions",
    "08": r"\? \w+  \(0 of 3\d tokens were known\)\n.*\? \w+  \([34]\d of 5\d tokens.*\nseed 1: \w+ \(stop",
    "09": r"^0\.25 s, 2 frames, 3\d tokens: .*\n(.*\n){2}1\.75 s, 8 frames, 8\d tokens: .*\n.*\n2\.75 s, 8 frames, 8\d",
}
LINES = 60


def run(script: Path, *words: str, path: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)} if path else None
    command = [sys.executable, str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_and_short() -> None:
    assert [path.name[:2] for path in EXAMPLES] == list(SAYS)
    assert OWN.is_dir()
    lines = {
        path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "examples").rglob("*.py")
    }
    assert {name: count for name, count in lines.items() if count >= LINES} == {}


def test_every_example_is_on_its_page() -> None:
    page = (ROOT / "docs/examples.md").read_text(encoding="utf-8")
    assert [path.name for path in [*EXAMPLES, OWN] if path.name not in page] == []


@pytest.mark.usefixtures("measured_here")
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(script: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """In this process, but for the first: importing torch and tracing the demo take longer than most of them."""
    if script == EXAMPLES[0]:
        out = run(script)
    else:
        monkeypatch.setattr(sys, "argv", [str(script)])
        runpy.run_path(str(script), run_name="__main__")
        out = capfd.readouterr().out
    assert re.search(SAYS[script.name[:2]], out), out


def test_a_method_of_an_installed_package(tmp_path: Path) -> None:
    """What pip leaves of the package: the module, and its description with the entry point."""
    (tmp_path / "clipped_rounding.py").write_bytes((OWN / "clipped_rounding.py").read_bytes())
    description = tmp_path / "clipped_rounding-0.1.0.dist-info"
    description.mkdir()
    (description / "METADATA").write_text("Metadata-Version: 2.1\nName: clipped-rounding\nVersion: 0.1.0\n")
    project = (OWN / "pyproject.toml").read_text(encoding="utf-8")
    (entry,) = re.findall(r'^\[project\.entry-points\."qe_edge\.methods"\]\n(\w+) = "(.+)"$', project, re.M)
    (description / "entry_points.txt").write_text(f"[qe_edge.methods]\n{entry[0]} = {entry[1]}\n")
    script = tmp_path / "use.py"
    script.write_text(
        "import torch, qe_edge\n"
        "from qe_edge.methods import METHODS\n"
        "print(METHODS.package('clipped'), METHODS.package('gptq'))\n"
        "weight = torch.tensor([[100.0] + [1.0] * 127])\n"
        "for quantile in (1.0, 0.9):\n"
        "    recipe = qe_edge.make_recipe(method='clipped', options={'quantile': quantile})\n"
        "    layer = qe_edge.quantize_linear(weight, torch.zeros(0, 128), recipe)\n"
        "    print(float(layer(torch.tensor([[0.0] * 127 + [1.0]]))))\n"
    )
    who, all_kept, clipped = run(script, path=tmp_path).splitlines()
    assert who == "clipped-rounding 0.1.0 None"
    assert float(all_kept) == 0  # 1 is less than half a step of 100 / 7
    assert float(clipped) == pytest.approx(1, rel=0.01)
