"""What reaches the terminal without --verbose: our notices and downloads, nothing else of other libraries."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest

from qe_edge.cli.quiet import quiet_libraries
from qe_edge.system.errors import QENotice


@pytest.mark.parametrize("verbose", [False, True])
def test_a_notice_is_one_line_every_time(capsys: pytest.CaptureFixture[str], verbose: bool) -> None:
    with quiet_libraries(verbose=verbose):
        for _ in range(2):
            warnings.warn("Something to know.", QENotice, stacklevel=1)
    assert capsys.readouterr().err == 2 * "Note: Something to know.\n"


@pytest.mark.parametrize("verbose", [False, True])
def test_other_warnings_are_shown_with_verbose_only(verbose: bool) -> None:
    with warnings.catch_warnings(record=True) as seen, quiet_libraries(verbose=verbose):
        warnings.warn("A library is worried.", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["A library is worried."] * verbose


CHILD = """
from qe_edge.cli.quiet import quiet_libraries
with quiet_libraries(verbose=False):
    from huggingface_hub.utils import are_progress_bars_disabled
    from qe_edge.models.loading import load_model
    load_model("demo")
    assert not are_progress_bars_disabled()
"""


def test_bars_of_downloads_are_left_and_those_of_loading_are_not() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
