"""The command line answers at once: nothing heavy is imported before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qe_edge import __version__
from qe_edge.cli.application import COMMANDS, application
from tests.cli.running import CHILD, Run

HEAVY = ("torch", "transformers", "numpy", "scipy", "sklearn", "pydantic", "rich", "yaml", "onnx", "onnxruntime", "PIL")
SPY = (
    "import sys; from qe_edge.cli import main; code = main(); "
    f"found = [name for name in {HEAVY!r} if name in sys.modules]; "
    "print('heavy:', *found); sys.exit(code)"
)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", SPY, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy:", done.stdout


def test_help_lists_every_command_with_a_sentence(child: Run) -> None:
    out = child("--help").out
    for name in COMMANDS:
        line = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert len(line.split()) > 3, line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_of_itself_and_help_for_every_option(cli: Run, name: str) -> None:
    out = cli(name, "--help").out
    assert f"qe-edge {name}" in out.partition("Example:")[2]
    command = application.get_command(None, name)  # type: ignore[arg-type] # the context is not used
    assert command is not None
    for option in command.params:
        if option.param_type_name == "option":
            assert getattr(option, "help", None), f"{name}: {option.name} has no help"


def test_options_that_mean_the_same_have_one_spelling() -> None:
    meanings: dict[str, set[tuple[str, ...]]] = {}
    for name in COMMANDS:
        command = application.get_command(None, name)  # type: ignore[arg-type] # the context is not used
        assert command is not None
        for option in command.params:
            if option.param_type_name == "option":
                meanings.setdefault(str(option.name), set()).add(tuple(option.opts))
    assert {name: spellings for name, spellings in meanings.items() if len(spellings) > 1} == {}


def test_version(cli: Run) -> None:
    assert cli("--version").out.strip() == f"QE-Edge {__version__}"


def test_shell_completion_offers_commands_and_options() -> None:
    def complete(line: str) -> str:
        environment = {
            **os.environ, "_QE_EDGE_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")),
        }  # fmt: skip
        return subprocess.run(CHILD, capture_output=True, text=True, check=True, env=environment).stdout

    assert "plain,quantize" in complete("qe-edge qu")
    assert "plain,--scheme" in complete("qe-edge quantize --sch")


def test_shell_completion_script_is_for_this_program() -> None:
    environment = {**os.environ, "_QE_EDGE_COMPLETE": "zsh_source"}
    out = subprocess.run(CHILD, capture_output=True, text=True, check=True, env=environment).stdout
    assert out.startswith("#compdef qe-edge")
