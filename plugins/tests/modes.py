"""The modes that the kernels claim; every test that sweeps modes sweeps these."""

from __future__ import annotations

from itertools import product
from typing import Any

from emulator.plan import Tactic
from prepack.floats import Dtype
from tests.cases import Mode

MODES = [
    Mode("w4a8"),
    Mode("w4a6", act_bits=6, experts=16, rank_routed=8, rank_shared=24),
    Mode("w4a8_asym", zeros=True, experts=0),
    Mode("w4a8_g128", group_size=128, experts=1, adapter_bits=8),
    Mode("w4a8_g128_asym", group_size=128, zeros=True),
    Mode("w4a6_g64", act_bits=6, group_size=64, bias=False),
    Mode("w4a8_g64_asym", group_size=64, zeros=True, inv_omega=False),
    Mode("w4a8_int8_adapters", adapter_bits=8),
    Mode("w4a8_no_adapters", rank_shared=0, experts=0, bias=False),
    Mode("w4a8_routed_only", rank_shared=0, rank_routed=32),
    Mode("w4a8_full_rank", rank_shared=128, rank_routed=128, experts=2),
    Mode("w4a16", act_bits=0),
    Mode("w4a16_g128_asym", act_bits=0, group_size=128, zeros=True),
    Mode(
        "w3a16_g128_asym",
        act_bits=0,
        group_size=128,
        zeros=True,
        weight_bits=3,
        inv_omega=False,
        experts=0,
        rank_shared=0,
    ),
    Mode("w3a16_g64_asym", act_bits=0, group_size=64, zeros=True, weight_bits=3, adapter_bits=8, experts=16),
    Mode("w3a8", weight_bits=3),
    Mode("w3a8_g64", weight_bits=3, group_size=64, experts=16, bias=False),
    Mode("w4a8_bf16", dtype="bf16"),
    Mode("w4a6_g128_bf16", dtype="bf16", act_bits=6, group_size=128, adapter_bits=8),
    Mode("w4a16_g128_asym_bf16", dtype="bf16", act_bits=0, group_size=128, zeros=True, adapter_bits=8, experts=16),
    Mode("w4a16_bf16", dtype="bf16", act_bits=0, experts=1),
    Mode("w4a8_int4_adapters", adapter_bits=4),
]
"""What the paper's settings and ours need: 3- and 4-bit weights, 6-, 8- and 16-bit activations, all scale shapes."""

TOKENS = [1, 3, 7, 16, 17, 65, 150]
EXPERTS = [0, 1, 8, 16]


def _combinations() -> list[tuple[Mode, int]]:
    """Every combination of activations, types, groups, zero points and adapters, at every token count.

    The number of experts rotates: at each token count every kind of activations and groups meets all of them, and so
    does every kind of zero points and adapters. Integer adapters have 8 bits or 4, such that every kernel of 4-bit
    weights meets both at every token count: 8- and 6-bit activations share one, and with 16-bit ones zero points do.
    """
    cases = []
    dtypes: tuple[Dtype, ...] = ("f16", "bf16")
    kinds = product((8, 6, 0), dtypes, (-1, 128, 64), (False, True), (False, True))
    for i, (act_bits, dtype, group_size, zeros, integers) in enumerate(kinds):
        for j, tokens in enumerate(TOKENS):
            experts = EXPERTS[(i + i // 4 + j) % len(EXPERTS)]
            adapter_bits = (8, 4)[((act_bits == 6) + zeros + j) % 2] if integers else 16
            parts = [
                f"a{act_bits or 16}",
                dtype,
                "channel" if group_size < 0 else f"g{group_size}",
                "asym" if zeros else "sym",
                "half" if adapter_bits == 16 else f"int{adapter_bits}",
                f"e{experts}",
            ]
            mode = Mode(
                "-".join(parts), act_bits, group_size, zeros, dtype=dtype, adapter_bits=adapter_bits, experts=experts
            )
            cases.append((mode, tokens))
    return cases


def _three_bit_combinations() -> list[tuple[Mode, int]]:
    """Every kernel of 3-bit weights twice at every token count: two widths of x, or with zero points and without.

    The number of experts rotates as above, and the kind of adapters.
    """
    cases = []
    kinds = [*product((8, 6), (False,), (-1, 128, 64)), *product((0,), (False, True), (-1, 128, 64))]
    for i, (act_bits, zeros, group_size) in enumerate(kinds):
        for j, tokens in enumerate(TOKENS):
            experts, adapter_bits = EXPERTS[(i + i // 3 + j) % len(EXPERTS)], (16, 8, 4)[(i // 3 + j) % 3]
            group = "channel" if group_size < 0 else f"g{group_size}"
            name = f"w3-a{act_bits or 16}-{group}-{'asym' if zeros else 'sym'}-e{experts}"
            mode = Mode(name, act_bits, group_size, zeros, weight_bits=3, adapter_bits=adapter_bits, experts=experts)
            cases.append((mode, tokens))
    return cases


def _prompts_without_a_router() -> list[tuple[Mode, int]]:
    """Kernels of prompts that the combinations above reach too seldom: without a correction, and some with one."""
    cases = []
    for dtype, tokens in product(_DTYPES, (65, 150)):
        for act_bits, group_size, zeros in ((8, -1, False), (6, -1, False), (8, -1, True), (0, 128, True)):
            name = f"plain-a{act_bits or 16}-{dtype}-{'asym' if zeros else 'sym'}"
            mode = Mode(name, act_bits, group_size, zeros, dtype=dtype, rank_shared=0, experts=0)
            cases.append((mode, tokens))
    cases.append((Mode("more-a8-bf16-int4-e0", dtype="bf16", adapter_bits=4, experts=0), 65))
    cases += [(Mode(f"more-a{a}-bf16-int8-e0", a, dtype="bf16", adapter_bits=8, experts=0), 150) for a in (8, 6)]
    return [*cases, (Mode("more-a8-bf16-int4-e4", dtype="bf16", adapter_bits=4, experts=4), 150)]


_DTYPES: tuple[Dtype, Dtype] = ("f16", "bf16")
WIDE = [
    *(
        Mode(f"wide-{dtype}{'-asym' * z}", zeros=z, dtype=dtype, experts=0)
        for dtype, z in product(_DTYPES, (False, True))
    ),
    Mode("wide-w3", weight_bits=3, adapter_bits=4, experts=0),
]
"""Every kernel with a warp tile of 64 x 64."""

COMBINATIONS = _combinations() + _three_bit_combinations() + _prompts_without_a_router()
COMBINATION_IDS = [f"{mode.name}-{tokens}" for mode, tokens in COMBINATIONS]


def _one_prompt_each() -> list[tuple[Mode, int]]:
    """The combinations with one of the two long prompts each, which take most of an emulator's time.

    Which one alternates by groups, zero points and adapters alike. Every kernel is among them, as a test says.
    """
    regular = len(_combinations() + _three_bit_combinations())
    kept = []
    for number, (mode, tokens) in enumerate(COMBINATIONS):
        kind = number // len(TOKENS)
        which = (kind + kind // 2 + kind // 4) % 2
        if number >= regular or tokens not in LONG or tokens == LONG[which]:
            kept.append((mode, tokens))
    return kept


LONG = (65, 150)
FEWER = _one_prompt_each()
FEWER_IDS = [f"{mode.name}-{tokens}" for mode, tokens in FEWER]


def shape_for(mode: Mode, tokens: int) -> tuple[int, int]:
    """K and N with tails: K is no multiple of 128 unless groups ask for it, N none of 32 or 128.

    At 3 and 16 tokens K is long enough for a warp of decode to come back to the first slot of its ring, and N has more
    columns than a block of the smallest GPU takes at once; at 65 the tiled product comes back to the first stage of its
    pipeline; at 150 K is short, because there the many blocks are the point.
    """
    if tokens == 150:
        return {-1: 136, 64: 192, 128: 256}[mode.group_size], 136
    k = {-1: 264, 64: 320, 128: 256}[mode.group_size]
    if tokens in (3, 16):
        return k + 256 + (k == 256) * 128, 296
    return k + (384 if tokens == 65 else 0), 40 if tokens <= 16 else 136


def tactic_for(tokens: int) -> Tactic:
    """At 3 and 16 tokens blocks have eight sets of columns, twice; at 17 three sets, of which one lacks columns."""
    return Tactic(multiprocessors={3: 1, 16: 1, 17: 4}.get(tokens, 16))


_CORRECTIONS: tuple[dict[str, Any], ...] = (
    {"experts": 8},
    {"experts": 0, "rank_shared": 0},
    {"experts": 16, "rank_shared": 24, "rank_routed": 32, "adapter_bits": 8},
    {"experts": 0, "rank_shared": 16, "adapter_bits": 4},
    {"experts": 2, "rank_shared": 0, "rank_routed": 32},
    {"experts": 1, "adapter_bits": 4},
    {"experts": 0, "rank_shared": 128, "adapter_bits": 8},
    {"experts": 4, "adapter_bits": 4},
)


def _cluster_cases() -> list[tuple[Mode, int]]:
    """Every kernel of clusters at every number of tokens; corrections and widths of x rotate."""
    kinds = [
        *product((4,), (8, 0), _DTYPES, (-1, 128, 64), (False, True)),
        *product((3,), (8, 0), _DTYPES[:1], (-1, 128, 64), (False, True)),
    ]
    kinds = [kind for kind in kinds if (kind[4] if kind[1] == 0 else kind[0] == 4 or not kind[4])]  # as kernels are
    cases = []
    for i, (weight_bits, act_bits, dtype, group_size, zeros) in enumerate(kinds):
        for tokens in range(1, 5):
            bits = act_bits and (8, 6)[(i + i // 3 + tokens) % 2]
            correction = _CORRECTIONS[(i + i // 4 + 2 * tokens) % len(_CORRECTIONS)]
            group = "channel" if group_size < 0 else f"g{group_size}"
            kind = f"w{weight_bits}-a{bits or 16}-{dtype}-{group}-{'asym' if zeros else 'sym'}"
            name = f"{kind}-r{correction.get('rank_shared', 32)}-e{correction['experts']}"
            omega = (i + tokens) % 3 != 0
            cases.append(
                (Mode(name, bits, group_size, zeros, weight_bits, dtype, inv_omega=omega, **correction), tokens)
            )
    return cases


CLUSTER_CASES = _cluster_cases()
CLUSTER_IDS = [f"{mode.name}-{tokens}" for mode, tokens in CLUSTER_CASES]


def cluster_shape(mode: Mode, tokens: int) -> tuple[int, int]:
    """K and N with tails: the last slice has fewer chunks or rows.

    Of 16 ranks a slice is long enough to be cut into parts for several warps, of 128 too long for its factors to be
    copied to shared memory; another lone token has clusters of eight blocks.
    """
    chunks = {16: 15, 128: 8}.get(mode.rank_shared, {1: 8 if mode.experts else 3, 2: 5, 3: 8, 4: 5}[tokens])
    return chunks * 128 - {-1: 120, 64: 64, 128: 0}[mode.group_size], {1: 72, 2: 200, 3: 168, 4: 72}[tokens]


def cluster_tactic(mode: Mode, tokens: int) -> Tactic:
    """At 2 tokens two clusters, of which one has another set of columns; then one with more sets than blocks."""
    if mode.rank_shared in (16, 128):
        return Tactic(multiprocessors=4, clusters=2)
    blocks, multiprocessors = {1: (8 if mode.experts else 1, 132), 2: (2, 4), 3: (4, 4), 4: (2, 2)}[tokens]
    return Tactic(multiprocessors=multiprocessors, clusters=blocks)
