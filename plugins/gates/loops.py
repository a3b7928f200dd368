"""The hot loop of a kernel, found in its SASS, and what one pass costs."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
_GUARD = re.compile(r"^@!?U?P\w+ ")


@dataclass(frozen=True)
class Loop:
    """Instructions of one pass of a loop, and how many of them are which."""

    instructions: int
    imma: int
    hmma: int
    async_copies: int  # 512 bytes each, per warp; in decode all of them are packed weights
    shared_loads: int  # 512 bytes each
    narrow_shared_loads: int
    weight_bits: int = 4

    @property
    def mma(self) -> int:
        """Matrix instructions over the weights, of either kind."""
        return self.imma + self.hmma

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one warp's pass: 16 x 8 x 32 of an IMMA, 16 x 8 x 16 of an HMMA."""
        return 4096 * self.imma + 2048 * self.hmma

    @property
    def per_mma(self) -> float:
        """Instructions issued for one matrix instruction."""
        return self.instructions / max(1, self.mma)

    @property
    def per_1000_mac(self) -> float:
        """Warp instructions issued for 1000 multiply-accumulates."""
        return 1000 * self.instructions / max(1, self.macs)

    @property
    def per_2048_weights(self) -> float:
        """Warp instructions for 2048 weights that come straight from DRAM: one KiB where they have 4 bits."""
        return self.instructions / max(1, self.async_copies) * self.weight_bits / 2


def _count(bodies: list[str], weight_bits: int) -> Loop:
    ops = [_GUARD.sub("", body).split()[0] for body in bodies]
    return Loop(
        instructions=len(ops),
        imma=sum(op.startswith("IMMA") for op in ops),
        hmma=sum(op.startswith("HMMA.16816") for op in ops),  # not those of 8 rows, which multiply zero points
        async_copies=sum(op.startswith("LDGSTS") for op in ops),
        shared_loads=sum(op == "LDS.128" for op in ops),
        narrow_shared_loads=sum(op in ("LDS.U8", "LDS.S8") for op in ops),
        weight_bits=weight_bits,
    )


def _branches(code: list[str]) -> list[tuple[int, int]]:
    """Indices of the branches and of where they lead."""
    position = {int(line.split(" ", 1)[0], 16): i for i, line in enumerate(code)}
    found = ((i, _BRANCH.search(line)) for i, line in enumerate(code))
    targets = ((i, position.get(int(match.group(1), 16))) for i, match in found if match)
    return [(i, target) for i, target in targets if target is not None]


def _loops(branches: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Index ranges of the backward branches."""
    return [(target, i) for i, target in branches if target < i]


def _of_a_pass(branches: list[tuple[int, int]], first: int, last: int) -> list[int]:
    """The instructions of a usual pass of a loop.

    Left out is what a branch skips and what has a loop of its own: it finds where the next part begins, which comes
    once in a part of K and not in every pass.
    """
    inner = [(start, end) for start, end in _loops(branches) if first < start and end < last]
    skipped = [
        (i + 1, target)
        for i, target in branches
        if first <= i < target <= last and any(i < start and end < target for start, end in inner)
    ]
    return [i for i in range(first, last + 1) if not any(start <= i < end for start, end in skipped)]


def hot_loop(code: list[str], weight_bits: int = 4) -> Loop:
    """The loop over K: the smallest that brings weights in (LDGSTS) and multiplies."""
    bodies = [line.split(" ", 1)[1] for line in code]
    branches = _branches(code)
    for first, last in sorted(_loops(branches), key=lambda each: each[1] - each[0]):
        loop = _count([bodies[i] for i in _of_a_pass(branches, first, last)], weight_bits)
        if loop.mma >= 8 and loop.async_copies >= weight_bits:
            return loop
    raise ValueError("no loop with both matrix instructions and weight loads. Look at the SASS.")


def down_loop(code: list[str]) -> Loop:
    """The loop over K of a down-projection: the smallest that multiplies; one pass is 32 rows."""
    bodies = [line.split(" ", 1)[1] for line in code]
    found = [loop for first, last in _loops(_branches(code)) if (loop := _count(bodies[first : last + 1], 4)).mma]
    if not found:
        raise ValueError("no loop with matrix instructions. Look at the SASS.")
    return min(found, key=lambda loop: loop.instructions)
