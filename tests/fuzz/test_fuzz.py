"""A short run of the fuzzer, always the same, and what the fuzzer itself promises."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qe_edge.system.errors import InputError
from tests.conftest import Exported
from tests.fuzz import worker
from tests.fuzz.json_changes import change_json
from tests.fuzz.mutations import change_file
from tests.fuzz.target import SilentSuccessError, Target
from tests.fuzz.worker import Outcome, run_case

ROOT = Path(__file__).parents[2]
SEED, CASES = 11, 6
OPEN = (  # what is being mended; this list only gets shorter
    "recipe", "samples",
)  # fmt: skip


@pytest.mark.slow
def test_a_short_run_of_every_target(exported: Exported, tmp_path: Path) -> None:
    """`python -m tests.fuzz --minutes 120 --seed N` is the long one."""
    shutil.copytree(exported.checkpoint, tmp_path / "sound" / "checkpoint" / "checkpoint")
    shutil.copytree(exported.onnx, tmp_path / "sound" / "onnx" / "onnx")
    words = ["--seed", SEED, "--cases", CASES, "--sound", tmp_path / "sound", "--json", tmp_path / "failed.json"]
    command = [sys.executable, "-m", "tests.fuzz", *map(str, words), "--corpus", str(tmp_path / "corpus")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=1800)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    failed = json.loads((tmp_path / "failed.json").read_text(encoding="utf-8"))
    assert {name: found for name, found in failed.items() if found and name not in OPEN} == {}


def memory() -> str:
    return str(len(bytearray(2**40)))


def hang() -> str:
    time.sleep(60)
    return ""


def spin() -> str:
    while True:
        pass


def refuse(words: str) -> Callable[[], str]:
    def read() -> str:
        raise InputError(f"There is no '{words}'.", "Give another.")

    return read


def silent() -> str:
    raise SilentSuccessError("nothing is finite")


def one_case(read: Callable[[], str], folder: Path) -> Outcome:
    (folder / "sound").mkdir()
    (folder / "sound" / "a.json").write_text('{"a": 1}', encoding="utf-8")
    target = Target("nothing", lambda _folder, _sound: None, lambda _folder: read(), ("*.json",))
    return run_case(target, folder / "sound", folder / "case", 0, 0, "")


@pytest.mark.parametrize(
    ("read", "verdict", "kind"),
    [
        (lambda: "", "accepted", ""),
        (refuse("a"), "refused", "InputError"),
        (refuse("a" * 9000), "opaque", "InputError"),
        (lambda: str(1 // 0), "exception", "ZeroDivisionError"),
        (memory, "memory", "MemoryError"),
        (hang, "hang", "1 s"),
        (spin, "hang", "1 s of CPU"),
        (os.abort, "killed", "SIGABRT"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "killed", "SIGSEGV"),
        (silent, "silent success", ""),
    ],
)
def test_verdicts(
    read: Callable[[], str], verdict: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "WALL_SECONDS", 1 if read is hang else 20)
    monkeypatch.setattr(worker, "CPU_SECONDS", 1 if read is spin else 20)
    outcome = one_case(read, tmp_path)
    assert (outcome.verdict, outcome.kind) == (verdict, kind), outcome
    assert outcome.failed == (verdict not in ("accepted", "refused"))


def test_a_changed_file_whose_hash_is_on_record_must_be_refused(tmp_path: Path) -> None:
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "payload").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "sound" / "list.json").write_text(json.dumps({"payload": known}), encoding="utf-8")
    target = Target("sealed", lambda _folder, _sound: None, lambda _folder: "", ("payload",))
    outcome = run_case(target, tmp_path / "sound", tmp_path / "case", 0, 0, "")
    assert outcome.verdict == "silent success", outcome


def test_a_change_depends_on_the_seed_alone(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        path = tmp_path / "a.json"
        path.write_text('{"a": [1, 2, {"b": "c"}], "d": null}', encoding="utf-8")
        found.append((change_file(path, random.Random(5)), path.read_bytes()))
        path.unlink()
    assert found[0] == found[1]


def test_json_changes_are_mostly_json() -> None:
    data = b'{"a": [1, 2, {"b": "c"}], "d": null}'
    changed = [change_json(data, random.Random(seed)) for seed in range(300)]
    assert sum(text != data for text in changed) > 250
    assert len(set(changed)) > 150
    assert sum(parses(text) for text in changed) > 250


def parses(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
