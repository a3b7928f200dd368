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
from tests.fuzz.mutations import YAML_BOMBS, change_file
from tests.fuzz.target import SilentSuccessError, Target
from tests.fuzz.worker import Outcome, run_case

ROOT = Path(__file__).parents[2]
SEED, CASES = 11, 6


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
    assert {name: found for name, found in failed.items() if found} == {}


def memory() -> str:
    return str(len(bytearray(2**40)))


def hang() -> str:
    time.sleep(60)
    return ""


def wait_in_a_loop() -> str:
    while True:
        time.sleep(0.05)


def hang_in_a_child() -> str:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"], check=False)
    return ""


def work_in_a_child() -> str:
    """Longer than may be idle."""
    code = "import time\nwhile time.process_time() < 4: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
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
        (hang, "hang", "2 s idle"),
        (wait_in_a_loop, "hang", "2 s idle"),
        (hang_in_a_child, "hang", "2 s idle"),
        (work_in_a_child, "accepted", ""),
        (spin, "hang", "1 s of CPU"),
        (os.abort, "killed", "SIGABRT"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "killed", "SIGSEGV"),
        (silent, "silent success", ""),
    ],
)
def test_verdicts(
    read: Callable[[], str], verdict: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "IDLE_SECONDS", 2)
    monkeypatch.setattr(worker, "CPU_SECONDS", 1 if read is spin else 30)
    outcome = one_case(read, tmp_path)
    assert (outcome.verdict, outcome.kind) == (verdict, kind), outcome
    assert outcome.failed == (verdict not in ("accepted", "refused"))


def test_a_process_that_works_for_very_long_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "WALL_SECONDS", 1)
    outcome = one_case(spin, tmp_path)
    assert (outcome.verdict, outcome.kind) == ("hang", "1 s"), outcome


def test_a_hang_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "IDLE_SECONDS", 1)
    assert one_case(hang, tmp_path).verdict == "hang"
    assert "in hang" in (tmp_path / "case.log").read_text(encoding="utf-8")
    monkeypatch.setattr(worker, "CPU_SECONDS", 1)
    shutil.rmtree(tmp_path / "sound")
    shutil.rmtree(tmp_path / "case")
    assert one_case(spin, tmp_path).kind == "1 s of CPU"
    assert "in spin" in (tmp_path / "case.log").read_text(encoding="utf-8")


def test_a_change_that_hangs_is_the_fuzzers_own_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "IDLE_SECONDS", 1)
    monkeypatch.setattr(worker, "change_file", lambda *_: time.sleep(60))
    assert one_case(lambda: "", tmp_path).verdict == "broken fuzzer"


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


NUMBERS_OF_STRANGERS = [b'{"a": %s}' % number for number in (b"9" * 400, b"-" + b"9" * 400, b"1e999", b"NaN")]


@pytest.mark.parametrize("text", NUMBERS_OF_STRANGERS)
def test_numbers_that_no_float_holds_change_too(text: bytes) -> None:
    assert len({change_json(text, random.Random(seed)) for seed in range(200)}) > 20


@pytest.mark.parametrize("bomb", YAML_BOMBS)
def test_a_changed_bomb_is_not_expanded(bomb: str, tmp_path: Path) -> None:
    for seed in range(20):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(bomb.encode())
        for step in range(5):
            if path.is_file() and not path.is_symlink():
                change_file(path, random.Random(f"{seed} {step}"))
        assert not path.is_file() or path.is_symlink() or path.stat().st_size < 50_000_000
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)


def parses(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
