"""Clusters in the PTX emulator: what a small kernel computes, and what is reported when one line of it is wrong."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from emulator.build import ROOT
from emulator.plan import Launch
from emulator.ptx import PtxMachine
from emulator.ptx_text import PtxError, PtxFile

# The first group of a block sends a word of every thread to all blocks of its cluster, the second group four words.
# Threads add up what came for their group's other warp. The first group waits for its box, of the second one warp.
SOUND = """
  wait_for_previous();
  QE_DYNAMIC_SHARED(shared);
  float *mine = reinterpret_cast<float*>(shared), *words = mine + 128, *fours = words + 256, *sums = fours + 1024;
  float sum = 0.f;
  uint64_t *box = reinterpret_cast<uint64_t*>(sums + 128), *second = box + 1;
  const int t = thread_id(), half = t & 63, group = 1 + (t >> 6), other = t ^ 32, rank = cluster_rank();
  if (t == 0) {
    open_box(box, 1024);
    open_box(second, 4096);
    boxes_are_open();
  }
  /* opened */
  cluster_arrive();
  mine[t] = static_cast<float>(block_x() * 128 + t);
  group_sync(group, 64);
  const float v = mine[other], four[4] = {v, v + 1.f, v + 2.f, v + 3.f};
  /* first */
  cluster_wait();
  if (group == 1) {
    for (int to = 0; to < 4; ++to) send(&words[rank * 64 + half], box, to, v);
    /* sent */
    wait_for_box(box);
    for (int from = 0; from < 4; ++from) sum += words[from * 64 + (half ^ 32)];
    /* read */
  } else {
    for (int to = 0; to < 4; ++to) send(&fours[(rank * 64 + half) * 4], second, to, four);
    if (t < 96) wait_for_box(second);
    group_sync(2, 64);
    for (int i = 0; i < 16; ++i) sum += fours[(i / 4 * 64 + (half ^ 32)) * 4 + i % 4];
  }
  sums[t] = sum;
  /* summed */
  block_sync();
  sum += sums[t ^ 64];
  /* last */
  p.out[block_x() * 128 + t] = sum;
"""
PLAIN = "cluster_arrive();\n  cluster_wait();"
OPEN_LATE = """boxes_are_open();
  }
  /* opened */
  cluster_arrive();"""
FAULTS = {
    "two_arrivals": ("/* first */", "cluster_arrive();", "two arrivals"),
    "no_arrival": ("cluster_arrive();", "", "a wait without an arrival"),
    "diverged": ("/* last */", f"if (t < 16) {{ {PLAIN} }}", "lanes diverge"),
    "no_wait": ("/* last */", "cluster_arrive();", "ends without the wait"),
    "no_such_block": ("to < 4", "to < 5", "no such block"),
    # boxes
    "no_box": ("open_box(box, 1024);", "", "to a box that is not open"),
    "made_twice": ("/* opened */", "block_sync(); if (t == 64) open_box(box, 0);", "made twice"),
    "no_fence": ("boxes_are_open();", "", "no fence"),
    "fence_of_another": ("boxes_are_open();\n  }", "} if (t == 1) boxes_are_open();", "no fence"),
    "fence_late": (OPEN_LATE, "} cluster_arrive(); if (t == 0) boxes_are_open();", "may not be open yet"),
    "sent_early": ("/* first */", "send(&words[rank * 64 + half], box, rank ^ 1, v);", "may not be open yet"),
    "more_bytes": ("open_box(box, 1024)", "open_box(box, 1020)", "more bytes than its box expects"),
    "fewer_bytes": ("open_box(box, 1024)", "open_box(box, 1028)", "a box that never fills"),
    "over_the_box": ("/* last */", "sum += reinterpret_cast<float*>(box)[t & 1];", "the word of a box"),
    "message_over_the_box": ("&words[rank * 64 + half]", "sums + 128", "over the word of a box"),
    "nobody_waits": ("if (t < 96) wait_for_box(second);", "", "ends without waiting until it is full"),
    "no_loop": ("wait_for_box(box)", "box_is_full(box)", "before a wait for its box"),
    "no_wait_for_a_box": ("wait_for_box(box);", "", "before a wait for its box"),
    "other_box": ("if (t < 96) wait_for_box(second);", "wait_for_box(box);", "before a wait for its box"),
    "not_told": ("group_sync(2, 64);", "", "before a wait for its box|that nobody wrote"),
    "wait_for_nothing": ("/* last */", "wait_for_box(box + 2);", "waits where none has been made"),
    # messages
    "out_of_bounds": ("&words[rank * 64 + half]", "sums + 132 + half", "message out of bounds"),
    "misaligned": (
        "send(&words[rank * 64 + half]",
        "send(reinterpret_cast<float*>(shared + 514)",
        "misaligned message of 4",
    ),
    "misaligned_four": (
        "&fours[(rank * 64 + half) * 4]",
        "&fours[(rank * 64 + half) * 4 + 1]",
        "misaligned message of 16",
    ),
    "two_messages": ("words[rank * 64 + half]", "words[half]", "over bytes of another one"),
    "one_twice": ("words[rank * 64 + half]", "words[rank * 64]", "over bytes of another one"),
    "own_write_before": ("/* first */", "words[t] = 0.f;", "may still use"),
    "own_read_before": ("/* first */", "sum += words[t];", "may still use"),
    "own_write_after": ("/* sent */", "words[(rank ^ 1) * 64 + half] = 0.f;", "message"),
    "ended": (
        "/* first */\n  cluster_wait();",
        "cluster_wait(); if (rank == 1) return; block_sync(); block_sync();",
        "has already ended",
    ),
    # groups
    "no_barrier": ("group_sync(group, 64);", "", "race of a read with a write"),
    "other_group": ("mine[other],", "mine[t ^ 64],", "race of a read with a write"),
    "only_groups": ("/* summed */\n  block_sync();", "group_sync(group, 64);", "race of a read with a write"),
    "write_after_read": ("/* last */", "sums[t] = 0.f;", "race of a write with a read"),
    "two_groups": ("group_sync(group, 64);", "group_sync(group, 64); group_sync(group + 1, 64);", "two groups"),
    "two_numbers": ("group_sync(group, 64);", "group_sync(group, t & 32 ? 64 : 96);", "two numbers of threads"),
    "no_number_of_warps": ("group_sync(group, 64);", "group_sync(group, 48);", "that no warps of the block have"),
    "more_warps": ("group_sync(group, 64);", "group_sync(group, 32);", "more warps than"),
    "number_0": ("group_sync(group, 64);", "group_sync(group - 1, 64);", "not 1 to 15"),
    "number_16": ("group_sync(group, 64);", "group_sync(group + 14, 64);", "not 1 to 15"),
    "lanes_apart": ("group_sync(group, 64);", "group_sync(1 + (t & 1), 64);", "lanes of a warp name two"),
    "never_complete": ("/* summed */", "if (t < 32) group_sync(1, 64);", "wait at named barrier 1 for others"),
    "deadlock": ("/* last */", f"if (t < 32) block_sync(); else {{ {PLAIN} }}", "at the cluster barrier for others"),
}
# Without clusters, on every chip: a group takes turns with itself, and the block meets once.
GROUPS = """
  wait_for_previous();
  QE_DYNAMIC_SHARED(shared);
  float* mine = reinterpret_cast<float*>(shared);
  const int t = thread_id(), group = 1 + (t >> 6);
  mine[t] = static_cast<float>(t);
  for (int turn = 0; turn < group * 2; ++turn) {
    group_sync(group, 64);
    const float v = mine[t ^ 32];
    group_sync(group, 64);
    mine[t] = v + 1.f;
  }
  block_sync();
  p.out[block_x() * 128 + t] = mine[t ^ 64];
"""
LEFT = f"if (t >= 32) return;\n  {PLAIN}"


def kernel(name: str, body: str) -> str:
    return f"QE_KERNEL void {name}(Args p) {{ using namespace qe; {body} }}\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kernels as PTX, by one call of the compiler."""
    folder = tmp_path_factory.mktemp("clusters")
    text = f'#include "{ROOT}/kernels/prim.cuh"\nstruct Args {{ float* out; }};\n'
    text += kernel("qe_plain", "p.out[thread_id()] = 1.f;") + kernel("qe_cluster_sound", SOUND)
    text += kernel("qe_cluster_left", SOUND.replace("/* last */", LEFT))
    for name, (before, after, _) in FAULTS.items():
        assert before in SOUND, name
        text += kernel(f"qe_cluster_{name}", SOUND.replace(before, after, 1))
    text += kernel("qe_groups", GROUPS) + kernel("qe_one_group", GROUPS.replace("block_sync();", ""))
    text += kernel("qe_after", "p.out[thread_id()] = 2.f;")
    (folder / "clusters.cu").write_text(text)
    target = folder / "clusters.ptx"
    command = ["nvcc", "-O3", "-std=c++17", "-arch=compute_80", "-ptx", str(folder / "clusters.cu"), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


@pytest.fixture(scope="module")
def machine(written: Path) -> PtxMachine:
    return PtxMachine(written, sm_90=True)


def run(machine: PtxMachine, name: str, seed: int = 1, **changes: int) -> tuple[list[str], np.ndarray]:
    machine.clear()
    out = np.zeros(12 * 128, np.float32)
    shape = {"grid_x": 12, "grid_y": 1, "threads": 128, "shared_bytes": 6160, "args_bytes": 8, "cluster": 4} | changes
    launch = Launch(kernel=name.encode(), **shape)
    ctypes.memmove(launch.args, np.array([machine.add(out, "out", writable=True)], np.uint64).ctypes.data, 8)
    return machine.launch(launch, seed), out


@pytest.mark.parametrize("name", ["sound", "left"])
def test_blocks_of_a_cluster_meet(machine: PtxMachine, name: str) -> None:
    """A cluster has another sum than its neighbour, although all of them run in step."""
    value = np.arange(12 * 128, dtype=np.float32).reshape(3, 4, 2, 64).sum(axis=1)
    sums = np.repeat(value[:, 0] + 4 * value[:, 1] + 24, 4, axis=0)
    for seed in range(4):
        errors, out = run(machine, f"qe_cluster_{name}", seed)
        assert errors == []
        ended = 32 if name == "left" else 128
        assert np.array_equal(out.reshape(12, 128)[:, :ended], np.tile(sums, 2)[:, :ended])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(machine: PtxMachine, name: str) -> None:
    for seed in range(2):  # in every schedule
        errors, _ = run(machine, f"qe_cluster_{name}", seed)
        assert any(re.search(FAULTS[name][2], error) for error in errors), errors


def test_groups_of_a_block_need_no_cluster(written: Path) -> None:
    thread = np.arange(128, dtype=np.float32)
    turns = np.repeat(np.array([2, 4], np.float32), 64)
    for seed in range(3):
        errors, out = run(PtxMachine(written), "qe_groups", seed, cluster=0)
        assert errors == []
        assert np.array_equal(out.reshape(12, 128), np.tile((thread + turns).reshape(2, 64)[::-1].ravel(), (12, 1)))
        assert (
            "shared memory: race of a read with a write" in run(PtxMachine(written), "qe_one_group", seed, cluster=0)[0]
        )


@pytest.mark.parametrize(("changes", "error"), [({"cluster": 5}, "clusters of 5"), ({"cluster": 1}, "no such block")])
def test_the_launch_names_the_cluster(machine: PtxMachine, changes: dict[str, int], error: str) -> None:
    assert any(error in each for each in run(machine, "qe_cluster_sound", **changes)[0])


def test_chips_below_9_0_get_all_but_the_kernels_of_clusters(written: Path) -> None:
    """What cmake cuts out is what the emulator cuts out, and the rest is as it was."""
    rest = written.with_name("below_90.ptx")
    script = ["cmake", f"-DFROM={written}", f"-DTO={rest}", "-P", str(ROOT / "cmake/below_90.cmake")]
    subprocess.run(script, check=True)
    shipped, emulated = PtxFile(rest.read_text(), sm_90=True), PtxFile(written.read_text())
    assert shipped.names == emulated.names == ["qe_plain", "qe_groups", "qe_one_group", "qe_after"]
    assert "mapa" not in rest.read_text()
    assert shipped.kernel("qe_after").code == emulated.kernel("qe_after").code
    with pytest.raises(PtxError, match="qe_cluster_sound"):
        PtxMachine(written).launch(Launch(kernel=b"qe_cluster_sound"), 1)
