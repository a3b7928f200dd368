"""Clusters in the PTX emulator: what a small kernel computes, and what is reported when one line of it is wrong."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from emulator.build import ROOT
from emulator.plan import Launch
from emulator.ptx import PtxMachine
from emulator.ptx_text import PtxError, PtxFile

# Every block sends a word of every thread to all blocks of its cluster; threads add up what arrived for a thread of the
# other warp. Twice, so that the second time writes over what the first one read.
SOUND = """
  wait_for_previous();
  QE_DYNAMIC_SHARED(shared);
  float *mine = reinterpret_cast<float*>(shared), *all = mine + 64, *kept = all + 256, sum = 0.f;
  const int t = thread_id(), other = t ^ 32, rank = cluster_rank();
  /* first */
  cluster_arrive();
  mine[t] = static_cast<float>(block_x() * 64 + t);
  block_sync();
  const float v = mine[other];
  cluster_wait();
  for (int turn = 0; turn < 2; ++turn) {
    for (int to = 0; to < 4; ++to) store_peer(&all[rank * 64 + t], to, v + static_cast<float>(turn));
    kept[t] = v;
    cluster_arrive();
    /* between */
    cluster_wait();
    for (int from = 0; from < 4; ++from) sum += all[from * 64 + other];
    sum += kept[other];
    /* read */
    cluster_arrive();
    cluster_wait();
  }
  /* last */
  p.out[block_x() * 64 + t] = sum;
"""
PLAIN = "cluster_arrive();\n  cluster_wait();"
FAULTS = {
    "two_arrivals": ("/* first */", "cluster_arrive();", "two arrivals"),
    "no_arrival": ("/* first */", "cluster_wait();", "a wait without an arrival"),
    "diverged": ("/* first */", f"if (t < 16) {{ {PLAIN} }}", "lanes diverge"),
    "too_early": ("/* first */", "store_peer(&all[rank * 64 + t], rank ^ 1, 0.f);", "may not have begun"),
    "out_of_bounds": ("rank * 64 + t], to", "5 * 64 + t + 1], to", "peer store out of bounds"),
    "misaligned": (
        "store_peer(&all[rank * 64 + t]",
        "store_peer(reinterpret_cast<float*>(shared + 258 + rank * 256 + t * 4)",
        "misaligned peer store",
    ),
    "no_such_block": ("to < 4", "to < 5", "no such block"),
    "block_barrier": (
        "cluster_arrive();\n    /* between */\n    cluster_wait();",
        "block_sync();",
        "no cluster barrier",
    ),
    "read_in_between": ("/* between */", "sum += all[(rank ^ 1) * 64 + other];", "no cluster barrier between"),
    "own_write_in_between": ("/* between */", "all[(rank ^ 1) * 64 + t] = 0.f;", "no cluster barrier between"),
    "write_in_between": ("/* between */", "kept[t] = 0.f;", "race of a read with a write"),
    "over_own_write": ("for (int to", "all[(rank ^ 1) * 64 + t] = 0.f;\n for (int to", "their own block uses"),
    "over_a_read": ("cluster_arrive();\n    cluster_wait();\n  }", "}", "their own block uses"),
    "two_peers": ("all[rank * 64 + t], to", "all[t], to", "another warp stores"),
    "deadlock": ("/* last */", f"if (t < 32) block_sync(); else {{ {PLAIN} }}", "deadlock"),
    "no_wait": ("/* last */", "cluster_arrive();", "ends without the wait"),
    "too_late": ("/* last */", "store_peer(&all[rank * 64 + t], rank ^ 1, 0.f);", "may have ended"),
    "alone": (
        "/* last */",
        "if (rank) return; store_peer(&all[t], 1, 0.f); cluster_arrive(); cluster_wait();",
        "ended",
    ),
}
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
    out = np.zeros(12 * 64, np.float32)
    shape = {"grid_x": 12, "grid_y": 1, "threads": 64, "shared_bytes": 6 * 256, "args_bytes": 8, "cluster": 4} | changes
    launch = Launch(kernel=name.encode(), **shape)
    ctypes.memmove(launch.args, np.array([machine.add(out, "out", writable=True)], np.uint64).ctypes.data, 8)
    return machine.launch(launch, seed), out


@pytest.mark.parametrize("name", ["sound", "left"])
def test_blocks_of_a_cluster_meet(machine: PtxMachine, name: str) -> None:
    """A cluster has another sum than its neighbour, although all of them run in step."""
    value = np.arange(12 * 64, dtype=np.float32).reshape(12, 2, 32)
    sent = np.repeat(value.reshape(3, 4, 2, 32).sum(axis=1), 4, axis=0)
    for seed in range(3):
        errors, out = run(machine, f"qe_cluster_{name}", seed)
        assert errors == []
        assert np.array_equal(out.reshape(12, 2, 32)[:, 0], (2 * sent + 4 + 2 * value)[:, 0])
        assert np.array_equal(out.reshape(12, 2, 32)[:, 1], (2 * sent + 4 + 2 * value)[:, 1] * (name == "sound"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(machine: PtxMachine, name: str) -> None:
    for seed in range(3):  # in every schedule
        errors, _ = run(machine, f"qe_cluster_{name}", seed)
        assert any(FAULTS[name][2] in error for error in errors), errors


@pytest.mark.parametrize(("changes", "error"), [({"cluster": 5}, "clusters of 5"), ({"cluster": 1}, "no such block")])
def test_the_launch_names_the_cluster(machine: PtxMachine, changes: dict[str, int], error: str) -> None:
    assert any(error in each for each in run(machine, "qe_cluster_sound", **changes)[0])


def test_chips_below_9_0_get_all_but_the_kernels_of_clusters(written: Path) -> None:
    """What cmake cuts out is what the emulator cuts out, and the rest is as it was."""
    rest = written.with_name("below_90.ptx")
    script = ["cmake", f"-DFROM={written}", f"-DTO={rest}", "-P", str(ROOT / "cmake/below_90.cmake")]
    subprocess.run(script, check=True)
    shipped, emulated = PtxFile(rest.read_text(), sm_90=True), PtxFile(written.read_text())
    assert shipped.names == emulated.names == ["qe_plain", "qe_after"]
    assert "mapa" not in rest.read_text()
    assert shipped.kernel("qe_after").code == emulated.kernel("qe_after").code
    with pytest.raises(PtxError, match="qe_cluster_sound"):
        PtxMachine(written).launch(Launch(kernel=b"qe_cluster_sound"), 1)
