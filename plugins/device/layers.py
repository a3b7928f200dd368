"""Layers for timing: packed tensors of the right sizes with random contents. Finite numbers, no meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device.gpu import ALIGNMENT, Arena, Gpu, round_up
from device.shapes import Way
from emulator.plan import Buffers, Launch, Planner, Problem, Tactic

POOL = 16 << 20  # bytes of each kind of random memory


@dataclass(frozen=True)
class Shape:
    """One layer's sizes.

    Attributes:
        k: in_features.
        n: out_features.
        way: How it is quantized.
    """

    k: int
    n: int
    way: Way

    def problem(self, tokens: int) -> Problem:
        """The host code's view of it."""
        w = self.way
        return Problem(
            dtype=0, M=tokens, N=self.n, K=self.k, act_bits=w.act_bits, group_size=w.group_size,
            has_zeros=int(w.zeros), has_inv_omega=int(w.inv_omega), rank_shared=w.rank_shared,
            rank_routed=w.rank_routed, num_experts=w.experts, adapter_bits=w.adapter_bits, weight_bits=w.weight_bits,
        )  # fmt: skip

    @property
    def routed(self) -> bool:
        """Whether tokens choose an expert. A single expert is part of the shared columns."""
        return self.way.experts > 1 and self.way.rank_routed > 0

    @property
    def stored_tiles(self) -> int:
        """16 columns of `down` each, those of all experts."""
        w = self.way
        shared = w.rank_shared + (w.rank_routed if w.experts == 1 else 0)
        return -(-shared // 16) + (w.experts * -(-w.rank_routed // 16) if self.routed else 0)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every tensor that prepack/pack.py makes of such a layer."""
        w, kp, np_ = self.way, round_up(self.k, 128), round_up(self.n, 32)
        groups = 1 if w.group_size < 0 else kp // w.group_size
        tiles, bits = self.stored_tiles, w.adapter_bits
        sizes = {
            "weight": np_ * kp * w.weight_bits // 8,
            "columns": 3 * np_ * 4,
            "scales": 2 * np_ * groups if w.group_size > 0 else 0,
            "zeros": np_ * groups if w.zeros or not w.act_bits else 0,
            "inv_omega": 2 * self.k if w.inv_omega else 0,
            "down": round_up(self.k, 32) * 16 * tiles * bits // 8,
            "down_scale": 4 * 16 * tiles,
            "up": 16 * tiles * np_ * bits // 8,
            "router": 2 * w.experts * self.k if self.routed else 0,
        }
        return {name: size for name, size in sizes.items() if size}

    def read_bytes(self, tokens: int) -> int:
        """Bytes that have to move at least: every tensor once, x and y; of `up` only experts that tokens can choose."""
        sizes, total = self.sizes, sum(self.sizes.values())
        if self.routed:
            unread = max(0, self.way.experts - tokens) * -(-self.way.rank_routed // 16)
            total -= sizes["up"] * unread // self.stored_tiles
        return total + 2 * tokens * (self.k + self.n)


def _small(name: str, size: int, way: Way, rng: np.random.Generator) -> NDArray[Any] | None:
    """Contents of a tensor whose values have to make sense; None for one that any bits will do for."""
    if name == "columns":
        return rng.random(size // 4, np.float32)
    if name == "down_scale":
        return rng.random(size // 4, np.float32) / 100
    if name == "zeros":
        return np.full(size, (1 << (way.weight_bits - 1)) * (8 if way.act_bits else 1), np.uint8)
    if name == "scales":  # in units that put the largest at 2^14 to 2^15
        return (rng.random(size // 2, np.float32) * 16384 + 16384).astype(np.float16)
    if name in {"inv_omega", "router"}:
        return rng.random(size // 2, np.float32).astype(np.float16)
    return None


def small_tensors(shape: Shape) -> dict[str, NDArray[Any]]:
    """Tensors that are not cut from random memory. Every copy of a layer has the same."""
    rng = np.random.default_rng(1)
    made = {name: _small(name, size, shape.way, rng) for name, size in shape.sizes.items()}
    return {name: tensor for name, tensor in made.items() if tensor is not None}


class RandomMemory:
    """Random bytes and random float16 numbers on the GPU. Weights are cut from them, each from another place.

    Args:
        gpu: The GPU.
        arena: Gives `RandomMemory.ROOM` bytes.
    """

    ROOM = 2 * POOL

    def __init__(self, gpu: Gpu, arena: Arena) -> None:
        rng = np.random.default_rng(0)
        self.gpu, self._at = gpu, 0
        self._bytes = arena.put(rng.integers(0, 256, POOL, np.uint8))
        self._halves = arena.put((rng.standard_normal(POOL // 2, np.float32) / 64).astype(np.float16))

    def fill(self, address: int, size: int, *, halves: bool) -> None:
        """Give a tensor contents, by copies on the GPU."""
        pool, done = self._halves if halves else self._bytes, 0
        while done < size:
            start = self._at % POOL
            part = min(size - done, POOL - start)
            self.gpu.copy(address + done, pool + start, part)
            done += part
            self._at += round_up(part, ALIGNMENT) + 4 * ALIGNMENT


def layer_room(shape: Shape) -> int:
    """Bytes of an arena that a layer takes."""
    return sum(round_up(size, ALIGNMENT) for size in shape.sizes.values())


class Layer:
    """A layer in GPU memory.

    Args:
        shape: Its sizes.
        arena: Gives `layer_room(shape)` bytes.
        random: Contents of large tensors.
        small: Addresses of what to copy into the others.
    """

    def __init__(self, shape: Shape, arena: Arena, random: RandomMemory, small: dict[str, int]) -> None:
        self.shape = shape
        self.addresses = {name: arena.take(size) for name, size in shape.sizes.items()}
        for name, size in shape.sizes.items():
            if name in small:
                random.gpu.copy(self.addresses[name], small[name], size)
            else:
                random.fill(self.addresses[name], size, halves=name in {"down", "up"} and shape.way.adapter_bits == 16)

    def launches(self, planner: Planner, tokens: int, tactic: Tactic, shared: dict[str, int]) -> list[Launch]:
        """The plan's launches; `shared` has the addresses of x, y, workspace and counters."""
        return planner.launches(self.shape.problem(tokens), Buffers(**shared, **self.addresses), tactic)
