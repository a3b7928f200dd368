"""A machine that only runs engines has none of the packages that quantizing and the server need."""

from __future__ import annotations

import subprocess
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from qe_edge.cli.outcome import QUANTIZE, SERVER
from qe_edge.doctor import MISSING, _packages
from tests.cli.running import CHILD
from tests.conftest import Exported

WITHOUT = (
    "import sys, importlib.util\n"
    "class Bare:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    f"        if name.partition('.')[0] in {QUANTIZE + SERVER!r}:\n"
    "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
    "sys.meta_path.insert(0, Bare())\n"
    "found = importlib.util.find_spec\n"
    f"importlib.util.find_spec = lambda name: None if name in {QUANTIZE!r} else found(name)\n"
)


def without(*words: str) -> subprocess.CompletedProcess[str]:
    """The command line where no extra is installed."""
    *python, code = CHILD
    return subprocess.run([*python, f"{WITHOUT}\n{code}", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", [("quantize", "demo", "-o", "out"), ("deploy", "demo", "-o", "out")])
def test_commands_that_need_more_say_how_to_install_it(command: tuple[str, ...]) -> None:
    done = without(*command)
    assert done.returncode == 2, done.stderr
    assert "which is not installed: here, engines can only be run." in done.stderr
    assert "Fix: Run: pip install 'qe-edge[quantize]'." in done.stderr
    assert "Traceback" not in done.stderr


def test_the_server_says_how_to_install_it(exported: Exported) -> None:
    done = without("serve", str(exported.onnx))
    assert done.returncode == 2, done.stderr
    assert "needs the Python package uvicorn, which is not installed." in done.stderr
    assert 'Fix: Run: pip install "qe-edge[server]".' in done.stderr
    assert "Traceback" not in done.stderr


def test_engines_answer(exported: Exported) -> None:
    picture = "qe_edge/demo/data/images/evaluation/0001.png"
    done = without("run", str(exported.onnx), "--image", picture, "--prompt", "what color is the shape?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(("extra", "modules"), [("quantize", QUANTIZE), ("server", SERVER)])
def test_the_extra_has_the_packages_that_the_message_knows(extra: str, modules: tuple[str, ...]) -> None:
    wanted = {
        requirement.name.lower()
        for requirement in map(Requirement, metadata.requires("qe-edge") or [])
        if requirement.marker and f'"{extra}"' in str(requirement.marker)
    }
    homes = metadata.packages_distributions()
    assert {homes[module][0].lower().replace("_", "-") for module in modules} == {
        name.replace("_", "-") for name in wanted
    }


def test_the_doctor_calls_them_missing_and_nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qe_edge.doctor.metadata.requires", lambda _name: ['nosuch>=1; extra == "quantize"'])
    (found,) = _packages()
    assert found.state == MISSING
    assert "qe-edge[quantize]" in found.remedy
