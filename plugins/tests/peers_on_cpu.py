"""The peers' process as far as a machine without a GPU can run it: small layers in torch on the CPU, by the clock."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from typing import Any

from device import peer_process, shapes, tensorrt_int4
from device.torch_peers import Body

SMALL: dict[str, list[tuple[int, int]]] = {"small": [(256, 64)]}


def clock(_torch: Any, body: Body) -> float:  # noqa: ANN401 - torch has no types here
    start = time.perf_counter()
    body()
    return 1e6 * (time.perf_counter() - start)


if __name__ == "__main__":
    shapes.MODELS.clear()
    shapes.MODELS.update(SMALL)
    shapes.TOKENS, shapes.STEP_TOKENS, shapes.BLOCKS = (1, 17, 256), (1,), 2
    tensorrt_int4.MODULES = ()
    sys.exit(peer_process.main(lambda _beyond: peer_process.Bench(import_module("torch"), "cpu", clock, 1)))
