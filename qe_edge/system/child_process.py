"""Starting helpers and other programs so that no file of the current folder runs in their place.

`python -m` and `python -c` put the current folder first on `sys.path`, and an empty entry of PATH, LD_LIBRARY_PATH or
PYTHONPATH means that folder too: a `json.py` or a `cmake` among somebody's downloads would be executed.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

SEARCH_PATHS = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH")
# -P does not exist before Python 3.11; from 3.13 on, -c imports a module before its code can take the folder off
OPTIONS = ("-P",) if sys.version_info >= (3, 11) else ()
TAKE_OFF = "import sys; sys.path[:] = [entry for entry in sys.path if entry]"


def isolated_code(code: str) -> list[str]:
    """Command line of a Python that runs some code, with this Python's packages and without the current folder.

    Start it with `safe_environment()`. PYTHONPATH and packages installed with `--user` hold as usual.

    Example:
        >>> isolated_code("print(1)")[-1].splitlines()[-1]
        'print(1)'
    """
    return [sys.executable, *OPTIONS, "-c", f"{TAKE_OFF}\n{code}"]


def isolated_module(module: str) -> list[str]:
    """Command line that runs a module as `python -m` does, without the current folder on `sys.path`.

    Example:
        >>> import subprocess
        >>> command = isolated_module("this")
        >>> done = subprocess.run(command, env=safe_environment(), capture_output=True, text=True, check=True)
        >>> done.stdout.splitlines()[0]
        'The Zen of Python, by Tim Peters'
    """
    return isolated_code(f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)")


def safe_environment() -> dict[str, str]:
    """This process's environment, without the entries of its search paths that stand for the current folder.

    Example:
        >>> environment = safe_environment()
        >>> [entry for entry in environment["PATH"].split(os.pathsep) if entry in ("", ".")]
        []
    """
    cleaned = {name: without_current_folder(os.environ.get(name, "")) for name in SEARCH_PATHS}
    others = {name: value for name, value in os.environ.items() if name not in SEARCH_PATHS}
    return {**others, **{name: value for name, value in cleaned.items() if value}}  # an empty PATH is that folder too


def without_current_folder(paths: str) -> str:
    """A search path without the entries that stand for the current folder, whichever that is.

    Example:
        >>> without_current_folder(":/usr/bin:.:lib")
        '/usr/bin:lib'
    """
    return os.pathsep.join(entry for entry in paths.split(os.pathsep) if os.path.normpath(entry) != os.curdir)


def find_program(name: str) -> str | None:
    """Absolute path of a program on PATH, None if there is none; the current folder is not looked at.

    Example:
        >>> find_program("sh").endswith("/sh"), find_program("no-such-program")
        (True, None)
    """
    found = shutil.which(name, path=without_current_folder(os.environ.get("PATH", "")) or os.defpath)
    return None if found is None else str(Path(found).absolute())


def forget_current_folder() -> list[str]:
    """Take the current folder off this process's search paths, unless QE-Edge itself was found there.

    What is named by its path stays. Of the packages that are imported later, none comes from where the user happens to
    be.

    Returns:
        Files of the current folder that Python itself ran before any line of ours, because of an empty entry in
        PYTHONPATH.

    Example:
        >>> forget_current_folder()
        []
        >>> "" in sys.path
        False
    """
    ran: list[str] = []
    with suppress(FileNotFoundError):  # the folder was deleted, so nothing is in it
        here = Path.cwd()
        if Path(__file__).parents[2] != here:
            unnamed = {"", *_made_absolute(here)}
            ran = _ran_at_start(unnamed)
            sys.path[:] = [entry for entry in sys.path if entry not in unnamed]
    safe = safe_environment()
    for name in os.environ.keys() - safe.keys():
        del os.environ[name]
    os.environ.update(safe)
    return ran


def _made_absolute(here: Path) -> list[str]:
    """What Python has made of entries of PYTHONPATH that stand for the current folder, unless others name it."""
    given = os.environ.get("PYTHONPATH", "")
    kept = without_current_folder(given)
    named = {Path(entry).absolute() for entry in kept.split(os.pathsep) if entry}
    return [] if kept == given or here in named else [str(here)]


def _ran_at_start(folders: Collection[str]) -> list[str]:
    """Files of these folders that Python runs whenever it starts."""
    files = [getattr(sys.modules.get(name), "__file__", None) for name in ("sitecustomize", "usercustomize")]
    return [file for file in files if file and str(Path(file).parent.absolute()) in folders]
