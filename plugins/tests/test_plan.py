"""The launch plan: limits of the chips, number of launches, and refusals that say what to do."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.plan import Buffers, Launch, PlanError, Planner, Problem, Tactic
from emulator.session import DTYPE_CODE
from prepack.floats import Dtype
from prepack.width import has_3_bit_kernels
from tests.forced import CLUSTER_PLACES, cluster_args, main_args

SMALLEST_SHARED_BYTES = 99 * 1024  # sm_86, 89 and 120


def problem(**changes: int) -> Problem:
    values = {
        "dtype": 0, "M": 1, "N": 1536, "K": 1536, "act_bits": 8, "group_size": -1, "has_zeros": 0, "has_inv_omega": 1,
        "rank_shared": 32, "rank_routed": 32, "num_experts": 8, "adapter_bits": 16, "weight_bits": 4,
    }  # fmt: skip
    return Problem(**(values | changes))


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.sampled_from([1, 7, 16, 17, 64, 1024, 4096]),
    k=st.sampled_from([128, 1536, 8960, 18944]),
    n=st.sampled_from([256, 2048, 37888]),
    act_bits=st.sampled_from([0, 6, 8]),
    group_size=st.sampled_from([-1, 64, 128]),
    form=st.sampled_from([(0, 4), (1, 4), (0, 3), (1, 3)]),
    rows=st.sampled_from([0, 64, 128]),
)
def test_fits_every_chip(
    planner: Planner, tokens: int, k: int, n: int, act_bits: int, group_size: int, form: tuple[int, int], rows: int
) -> None:
    zeros, bits = form
    bits = bits if has_3_bit_kernels(act_bits, bool(zeros), "f16") else 4
    case = problem(M=tokens, K=k, N=n, act_bits=act_bits, group_size=group_size, has_zeros=zeros, weight_bits=bits)
    if rows == 128 and act_bits == 0:
        with pytest.raises(PlanError, match="block_rows"):
            planner.launches(case, Buffers(), Tactic(rows, 0))
        return
    launches = planner.launches(case, Buffers(), Tactic(rows, 0))
    assert len(launches) == (2 if launches[-1].name.startswith("qe_decode") else 3)
    for launch in launches:
        assert 0 < launch.threads <= 1024 and launch.threads % 32 == 0
        assert launch.grid_x > 0 and 0 < launch.grid_y < 65536
        assert launch.shared_bytes <= SMALLEST_SHARED_BYTES


PLAIN = {"rank_shared": 0, "rank_routed": 0, "num_experts": 0}
CORRECTIONS = [PLAIN, {"rank_shared": 64, "rank_routed": 32}, {"rank_shared": 8, "rank_routed": 8, "num_experts": 1}]


@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 5, 16, 17, 64, 65, 1024])
def test_launches_only_what_is_needed(planner: Planner, tokens: int, correction: dict[str, int]) -> None:
    """Decode of up to 4 tokens is the product alone. A correction adds a launch; a router adds one to a GEMM's two."""
    plain, routes = correction is PLAIN, correction == {"rank_shared": 64, "rank_routed": 32}
    for act_bits in (0, 8):
        case = problem(M=tokens, act_bits=act_bits, has_inv_omega=act_bits // 8, **correction)
        names = [launch.name for launch in planner.launches(case, Buffers(), Tactic())]
        if tokens <= 4:
            expected = ["qe_decode"] if plain else ["qe_down_decode", "qe_decode"]
        elif tokens <= 16:
            expected = ["qe_prepare" if plain else "qe_prepare_down", "qe_decode"]
        else:
            expected = [*(["qe_prepare", "qe_down_prefill"] if routes else ["qe_prepare_prefill"]), "qe_prefill"]
        assert len(names) == len(expected)
        assert all(name.startswith(f"{start}_") for name, start in zip(names, expected, strict=True))
        assert ("_t8_" in names[-1]) == (tokens <= 4) and ("_t16_" in names[-1]) == (5 <= tokens <= 16)


QWEN2_VL = [
    (1536, 2048), (1536, 1536), (1536, 17920), (8960, 1536), (3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584),
    (1280, 3840), (1280, 1280), (1280, 5120), (5120, 1280),
]  # fmt: skip
"""in_features and out_features of every linear of the 2B and 7B models, vision included."""
MULTIPROCESSORS = [16, 46, 132, 170]
FORMS = [
    {"act_bits": 8}, {"act_bits": 6, "group_size": 64, "has_zeros": 1},
    {"act_bits": 0, "group_size": 128, "has_zeros": 1}, {"act_bits": 0, "weight_bits": 3},
    {"act_bits": 8, "group_size": 128, "weight_bits": 3},
]  # fmt: skip


def check_covers(main: Launch, columns: int) -> None:
    """Every block of 32 columns and every chunk of K belongs to one set, slice and warp."""
    args = main_args(main)
    blocks = (columns + 31) // 32
    taken = sorted(
        first + of_set * main.grid_x
        for x in range(main.grid_x)
        for first in range(x, blocks, main.grid_x * args.sets)
        for of_set in range(args.sets)
        if first + of_set * main.grid_x < blocks
    )
    assert taken == list(range(blocks))
    chunks = []
    for split in range(args.k_splits):
        own = min(args.slice_chunks, args.chunks - split * args.slice_chunks)
        assert own > 0
        for part in range(args.set_warps):
            start = part * args.warp_chunks
            chunks += [split * args.slice_chunks + chunk for chunk in range(start, min(start + args.warp_chunks, own))]
    assert chunks == list(range(args.chunks))
    warps = args.sets * args.set_warps
    assert main.threads == 32 * warps and main.grid_y == args.k_splits * args.token_groups
    assert [warp * args.set_factor >> 8 for warp in range(warps)] == [warp // args.set_warps for warp in range(warps)]


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize("shape", QWEN2_VL, ids=str)
def test_grids_fill_the_gpu(planner: Planner, shape: tuple[int, int], multiprocessors: int) -> None:
    k, n = shape
    for form, correction, counters in product(FORMS, CORRECTIONS, (0, 256)):
        for tokens in (1, 2, 3, 4, 5, 16, 17, 33, 64, 65, 150, 1024):
            case = problem(M=tokens, K=k, N=n, **(form | correction))
            launches = planner.launches(case, Buffers(counters=counters), Tactic(multiprocessors=multiprocessors))
            for launch in launches:
                assert launch.grid_x * launch.grid_y > 1
                assert launch.shared_bytes <= SMALLEST_SHARED_BYTES
            main = launches[-1]
            if main.name.startswith("qe_prefill"):
                rows = 128 if main.name.startswith("qe_prefill_wide") else 64
                assert (main.grid_x, main.grid_y) == (-(-n // 128), -(-tokens // rows))
                continue
            check_covers(main, n)
            args = main_args(main)
            assert args.k_splits == 1 or counters
            if args.k_splits == 1 and "_t8_" in main.name:  # blocks that meet may come one after the other
                assert main.grid_x <= multiprocessors


@pytest.mark.parametrize("multiprocessors", [1, *MULTIPROCESSORS, 192])
def test_the_workspace_is_enough_on_every_gpu(planner: Planner, multiprocessors: int) -> None:
    """Its size is known when an engine is built, the plan only on the GPU."""
    start = 1 << 20
    for k, n, tokens in product((264, 8960, 18944, 131072), (8, 72, 1536, 12288), (1, 3, 4, 5, 16, 17, 40, 64, 65)):
        for form, correction in product(FORMS[1:3], CORRECTIONS):
            case = problem(M=tokens, K=k // 128 * 128, N=n, **(form | correction))
            end = start + planner.workspace_bytes(case)
            main = planner.launches(
                case, Buffers(workspace=start, counters=256), Tactic(multiprocessors=multiprocessors)
            )[-1]
            args = main_args(main)
            decode = main.name.startswith("qe_decode")
            places = -(-tokens // 16) * 16 if decode else tokens
            columns = 16 * (args.shared_tiles + args.E * args.routed_tiles)
            parts = {
                args.act: places * args.Kp * (2 if form["act_bits"] == 0 else 1),
                args.partial: args.splits * tokens * columns * 4 if decode else 0,
                args.slices: args.k_splits * tokens * args.Np * 4 if args.k_splits > 1 else 0,
                args.scores: args.splits * tokens * 64 if decode and tokens <= 4 and args.E else 0,
                args.h: tokens * 32 * (args.shared_tiles + args.routed_tiles) if not decode else 0,
            }
            assert all(at + size <= end for at, size in parts.items())
            if args.k_splits > 1:
                assert planner.counter_bytes(case) == 4 * args.token_groups * args.Np // 32


def test_huge_k_has_slices(planner: Planner) -> None:
    """Where the columns leave most of the GPU empty."""
    case = problem(K=131072, N=256, **PLAIN)
    slices = [
        main_args(planner.launches(case, Buffers(counters=at), Tactic(multiprocessors=132))[-1]).k_splits
        for at in (0, 256)
    ]
    assert slices == [1, 4]


@pytest.mark.parametrize("multiprocessors", [2, 20, 84, 132, 170])
@pytest.mark.parametrize("shape", [*QWEN2_VL, (264, 72), (136, 8), (131072, 256)], ids=str)
def test_clusters_cover_the_layer_once(planner: Planner, shape: tuple[int, int], multiprocessors: int) -> None:
    """One launch of 1 to 4 tokens: all columns have a cluster and an owner, every chunk of K has a block and a warp."""
    k, n = shape
    for form, correction, tokens, size in product(FORMS, CORRECTIONS, (1, 3, 4), (1, 2, 4, 8)):
        if form.get("group_size", -1) > 0 and k % form["group_size"]:
            continue
        tactic = Tactic(multiprocessors=multiprocessors, clusters=size)
        launches = planner.launches(problem(M=tokens, K=k, N=n, **(form | correction)), Buffers(counters=256), tactic)
        if not launches[0].name.startswith("qe_cluster"):
            assert not 264 < k < 20000 or tokens > 1 or multiprocessors < 84 or size != 1
            continue
        (launch,) = launches
        args, blocks = cluster_args(launch), -(-n // 32)
        assert launch.cluster == args.cluster_blocks == 1 << args.cluster_shift and size in (1, launch.cluster)
        assert launch.grid_x % launch.cluster == 0 and launch.grid_x <= multiprocessors and launch.grid_y == 1
        clusters = launch.grid_x // launch.cluster
        sets = [args.cluster_sets + (cluster < args.longer_clusters) for cluster in range(clusters)]
        assert min(sets) > 0
        taken = [cluster + i * clusters for cluster in range(clusters) for i in range(sets[cluster])]
        assert sorted(taken) == list(range(blocks))
        assert (launch.cluster - 1) * args.slice_chunks < args.chunks <= launch.cluster * args.slice_chunks
        assert args.part_chunks * args.parts >= args.slice_chunks
        tasks = range(max(sets) * args.parts)
        assert [task * args.parts_factor >> 16 for task in tasks] == [task // args.parts for task in tasks]
        places = [getattr(args, place) for place in CLUSTER_PLACES]
        assert places == sorted(places) and all(place % 16 == 0 for place in places)
        assert places[-1] + 32 == launch.shared_bytes
        assert launch.shared_bytes <= SMALLEST_SHARED_BYTES and launch.threads == 256


def test_clusters_only_where_the_gpu_has_them(planner: Planner) -> None:
    for tokens, clusters in ((1, 0), (5, 1)):
        names = [launch.name for launch in planner.launches(problem(M=tokens), Buffers(), Tactic(clusters=clusters))]
        assert not any(name.startswith("qe_cluster") for name in names)


BAD = [
    {"dtype": 2}, {"M": 0}, {"M": -5}, {"M": 1 << 21}, {"K": 0}, {"K": 12}, {"K": 1 << 20}, {"N": 12}, {"N": 0},
    {"act_bits": 4}, {"group_size": 32}, {"group_size": 0}, {"K": 1544, "group_size": 128}, {"rank_shared": 129},
    {"rank_routed": -1}, {"num_experts": 17}, {"num_experts": 0}, {"has_zeros": 2}, {"adapter_bits": -1},
    {"adapter_bits": 0}, {"adapter_bits": 1}, {"adapter_bits": 5}, {"adapter_bits": 32},
    {"num_experts": 1, "rank_shared": 128}, {"has_inv_omega": 77}, {"M": 1 << 20, "K": 131072},
    {"weight_bits": 0}, {"weight_bits": 2}, {"weight_bits": 5}, {"weight_bits": -3}, {"weight_bits": 3, "dtype": 1},
    {"weight_bits": 3, "has_zeros": 1}, {"weight_bits": 3, "has_zeros": 1, "act_bits": 6, "group_size": 128},
]  # fmt: skip


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_refuses_with_a_reason_and_a_remedy(planner: Planner, changes: dict[str, int]) -> None:
    case = problem(**changes)
    why = planner.refusal(case)
    assert why is not None and why.count(". ") == 1 and why.endswith(".")
    assert planner.workspace_bytes(case) == 0
    with pytest.raises(PlanError):
        planner.launches(case, Buffers(), Tactic())


@pytest.mark.parametrize("dtype", DTYPE_CODE)
@pytest.mark.parametrize("group_size", [-1, 64, 128])
@pytest.mark.parametrize("zeros", [0, 1])
@pytest.mark.parametrize("act_bits", [0, 6, 8])
def test_prepack_knows_which_kernels_read_3_bits(
    planner: Planner, act_bits: int, zeros: int, group_size: int, dtype: Dtype
) -> None:
    case = problem(act_bits=act_bits, has_zeros=zeros, group_size=group_size, dtype=DTYPE_CODE[dtype], weight_bits=3)
    assert (planner.refusal(case) is None) == has_3_bit_kernels(act_bits, bool(zeros), dtype)


@pytest.mark.parametrize(
    "tactic",
    [Tactic(block_rows=32), Tactic(block_rows=192), Tactic(decode_warps=3), Tactic(-64, 0), Tactic(clusters=3)],
)
def test_refuses_unknown_tactics(planner: Planner, tactic: Tactic) -> None:
    with pytest.raises(PlanError, match="tactic"):
        planner.launches(problem(), Buffers(), tactic)
