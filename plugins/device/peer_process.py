"""The process in which peers run: one that crashes takes this process along, and not the kit.

    python -m device.peer_process --out FILE --beyond BYTES --seconds S PEER...

Writes one JSON line for everything that it finds: {"start": peer}, a row,
{"peer": ..., "what": ..., "skipped": why}, {"done": peer}.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from device import shapes, tensorrt_int4
from device.torch_peers import FLOAT16, HUMMING, PEERS, Body, Peer, float16_step, graph_time

Row = dict[str, Any]
MOST_FAILURES = 3  # of a peer, before it is left alone
REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError)
NAMES = (*(peer.name for peer in PEERS), tensorrt_int4.NAME)


@dataclass(frozen=True)
class Bench:
    """Where and how peers are timed.

    Attributes:
        torch: The module.
        device: "cuda"; tests have "cpu".
        measure: Microseconds of a body, given torch and it.
        beyond: Bytes that the copies of a layer exceed together.
    """

    torch: Any
    device: str
    measure: Callable[[Any, Body], float]
    beyond: int

    def linear(self, peer: Peer, k: int, n: int, tokens: int) -> Row:
        """One product."""
        size = k * n * peer.weight_bits // 8
        count = shapes.copies(size, self.beyond)
        body = peer.make(self.torch, k, n, tokens, count, self.device)
        return {"k": k, "n": n, "tokens": tokens, "copies": count, "bytes": size + 2 * tokens * (k + n),
                "microseconds": self.measure(self.torch, body) / count}  # fmt: skip

    def step(self, pairs: list[tuple[int, int]], tokens: int) -> Row:
        """The layers of all blocks in FP16."""
        many = pairs * shapes.BLOCKS
        body = float16_step(self.torch, many, tokens, self.device)
        size = sum(2 * (k * n + tokens * (k + n)) for k, n in many)
        return {"blocks": shapes.BLOCKS, "tokens": tokens, "launches": len(many), "bytes": size,
                "microseconds": self.measure(self.torch, body)}  # fmt: skip

    def rows(self, peer: Peer, deadline: float) -> Iterator[Row]:
        """Steps, where the peer has them, and products until `deadline` (of time.monotonic)."""
        if peer.name == FLOAT16:
            for model, pairs in shapes.MODELS.items():
                for tokens in shapes.STEP_TOKENS:
                    yield self._row(
                        peer, f"step of {model} at {tokens} tokens", model, partial(self.step, pairs, tokens)
                    )
        failures = 0
        for tokens in shapes.TOKENS:
            if not peer.least_tokens <= tokens <= peer.most_tokens:
                continue
            for model, pairs in shapes.MODELS.items():
                for k, n in pairs:
                    what = f"{k} x {n} at {tokens} tokens"
                    if time.monotonic() > deadline:
                        yield {"peer": peer.name, "what": f"{what} and what follows", "skipped": "The time was up."}
                        return
                    row = self._row(peer, what, model, partial(self.linear, peer, k, n, tokens))
                    yield row
                    failures += "skipped" in row
                    if failures == MOST_FAILURES:
                        return

    def _row(self, peer: Peer, what: str, model: str, measure: Callable[[], Row]) -> Row:
        try:
            row = {"peer": peer.name, "model": model, **measure()}
        except REFUSALS as error:
            if "CUDA error" in str(error):
                raise  # the context is lost, for the other peers too: they get a new process
            lines = str(error).strip().splitlines() or [type(error).__name__]
            row = {"peer": peer.name, "what": what, "skipped": lines[0][:200]}
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
        return row


def missing(name: str) -> str | None:
    """Why a peer cannot run here, or None."""
    if name == tensorrt_int4.NAME:
        return tensorrt_int4.missing()
    if find_spec("torch") is None:
        return "torch is not installed."
    if name.startswith(HUMMING) and find_spec("humming") is None:
        return "humming-kernels is not installed."
    return None


def peer_rows(names: list[str], bench: Callable[[], Bench], seconds: float, beyond: int) -> Iterator[Row]:
    """Everything that the process writes. cuBLAS FP16, which ratios need, has all the time; others share the rest."""
    ends, made = time.monotonic() + seconds, None
    reasons = {name: missing(name) for name in names}
    left = sum(why is None for why in reasons.values())
    for name, why in reasons.items():
        yield {"start": name}
        if why is not None:
            yield {"peer": name, "skipped": why}
            yield {"done": name}
            continue
        if name != tensorrt_int4.NAME:
            made = made or bench()
            yield {"torch": made.torch.__version__}
        now = time.monotonic()
        deadline = ends if name == FLOAT16 else now + max(0.0, ends - now) / left
        if name == tensorrt_int4.NAME or made is None:
            yield from ({"peer": name, **row} for row in tensorrt_int4.rows(deadline, beyond))
        else:
            yield from made.rows(next(peer for peer in PEERS if peer.name == name), deadline)
        left -= 1
        yield {"done": name}


def cuda_bench(beyond: int) -> Bench:
    """On the GPU. Raises RuntimeError when torch sees none."""
    torch = import_module("torch")
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU.")
    return Bench(torch, "cuda", graph_time, beyond)


def main(make_bench: Callable[[int], Bench] = cuda_bench) -> int:
    """Write rows as they come."""
    parser = argparse.ArgumentParser(description="Time peers of the QELinear kernels.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beyond", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("peers", nargs="+", choices=NAMES)
    options = parser.parse_args()
    with options.out.open("a", encoding="utf-8") as out:
        for row in peer_rows(options.peers, lambda: make_bench(options.beyond), options.seconds, options.beyond):
            out.write(json.dumps(row) + "\n")
            out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
