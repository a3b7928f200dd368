"""Parts of a benchmark in processes of their own, so that a fault of one, also one of CUDA, leaves the others alone."""

from __future__ import annotations

import ctypes
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

Body = Callable[[], dict[str, Any]]


def in_child(part: str, body: Body, sender: Any) -> None:  # noqa: ANN401 - a connection
    """Run a part and send its result, or the end of its traceback."""
    try:
        # inference_mode is left out where torch.compile has to see plain tensors
        with torch.no_grad():
            sender.send(body())
    except BaseException:  # noqa: BLE001 - a benchmark shows what happened
        lines = traceback.format_exc().strip().splitlines()
        print(f"FAILED {part}: " + "\n    ".join(lines[-6:]), flush=True)
        sender.send({"failed": lines[-12:]})
    sys.stdout.flush()


def can_fork() -> bool:
    """Whether CUDA has not started here, so that it can in a forked process, which imports nothing again."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return True
    return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())))


def run_part(part: str, body: Body, seconds: float) -> dict[str, Any]:
    """A part in a process of its own, which is ended when its time is over. `body` can be pickled."""
    print(f"== {part}, {seconds:.0f} s left", flush=True)
    context: Any = multiprocessing.get_context("fork" if can_fork() else "spawn")  # typed without its Process
    receiver, sender = context.Pipe(duplex=False)
    started = time.perf_counter()
    child = context.Process(target=in_child, args=(part, body, sender))
    child.start()
    sender.close()
    found: dict[str, Any] = {"failed": ["out of time"]}
    try:
        if receiver.poll(seconds):
            found = receiver.recv()
        else:
            print(f"FAILED {part}: out of time", flush=True)
    except EOFError:
        print(f"FAILED {part}: its process ended", flush=True)
        found = {"failed": ["its process ended"]}
    child.join(5 if "failed" not in found else 0)
    child.kill()
    found["part_s"] = time.perf_counter() - started
    print(f"   {part} took {found['part_s']:.1f} s", flush=True)
    return found
