"""Power rails of Jetson boards, as trees of files: found, sampled, integrated; and files that lie."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qe_edge.system.errors import ResourceError
from qe_edge.system.power import MOST_RAILS, PowerMeter, Rail, find_rails, joules

ORIN_NX = {"VDD_IN": (5000, 1200), "VDD_CPU_GPU_CV": (4900, 300), "VDD_SOC": (4900, 200)}
AGX_ORIN = {"VDD_GPU_SOC": (19800, 200), "VDD_CPU_CV": (19800, 100), "VIN_SYS_5V0": (5000, 600)}
THOR = {"VDD_GPU": (12000, -32), "VDD_CPU_SOC_MSS": (12000, 400), "VIN_SYS_5V0": (5000, 1300)}
JUNK = {
    "huge": b"9" * 400,
    "more than a board": b"999999999999",
    "far below zero": b"-900000",
    "binary": bytes(range(256)),
    "empty": b"",
    "words": b"5000 mA",
    "fraction": b"50.5",
    "underscores": b"5_000",
    "NUL": b"5\x000",
}


def monitor(root: Path, rails: dict[str, tuple[int, int]], place: str = "1-0040/hwmon/hwmon3") -> Path:
    """Files of an INA3221 as the kernel names them, with the sum of shunts that it has too."""
    folder = root / "bus/i2c/drivers/ina3221" / place
    folder.mkdir(parents=True)
    for number, (name, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        (folder / f"in{number}_label").write_text(f"{name}\n")
        (folder / f"in{number}_input").write_text(f"{millivolts}\n")
        (folder / f"curr{number}_input").write_text(f"{milliamperes}\n")
    (folder / "in7_label").write_text("sum of shunt voltages\n")
    (folder / "in7_input").write_text("12\n")
    return folder


def power(root: Path) -> tuple[list[str], float]:
    rails = find_rails(root).rails
    return [rail.name for rail in rails], sum(rail.watts() for rail in rails)


def test_the_module_of_an_orin_nx(tmp_path: Path) -> None:
    monitor(tmp_path, ORIN_NX)
    assert power(tmp_path) == (["VDD_IN"], pytest.approx(6.0))
    assert find_rails(tmp_path).notices == ()


def test_an_agx_orin_is_a_sum_of_three_and_memory_is_counted_once(tmp_path: Path) -> None:
    monitor(tmp_path, AGX_ORIN)
    monitor(tmp_path, {"NC": (0, 0), "VDDQ_VDD2_1V8AO": (5000, 300)}, "1-0041/hwmon/hwmon4")
    names, watts = power(tmp_path)
    assert names == list(AGX_ORIN)
    assert watts == pytest.approx(19.8 * 0.3 + 5 * 0.6)
    monitor(tmp_path, {"NC": (0, 0)}, "1-0042/hwmon/hwmon5")
    assert find_rails(tmp_path).notices == ()  # NC is no rail, however often it is there


def test_thor_with_and_without_a_monitor_at_its_input(tmp_path: Path) -> None:
    monitor(tmp_path, THOR, "2-0040/hwmon/hwmon5")
    names, watts = power(tmp_path)
    assert names == list(THOR)
    assert watts == pytest.approx(12 * 0.368 + 5 * 1.3)  # an idle GPU's monitor reads below zero
    folder = tmp_path / "bus/i2c/drivers/ina238/2-0044/hwmon/hwmon6"
    folder.mkdir(parents=True)
    (folder / "power1_input").write_text("23500000\n")
    assert power(tmp_path) == (["VIN"], pytest.approx(23.5))


def test_kernels_before_jetpack_5(tmp_path: Path) -> None:
    folder = tmp_path / "bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    folder.mkdir(parents=True)
    (folder / "rail_name_0").write_text("POM_5V_IN\n")
    (folder / "in_power0_input").write_text("4210\n")
    assert power(tmp_path) == (["POM_5V_IN"], pytest.approx(4.21))


def test_a_desktop_has_none_and_says_nothing(tmp_path: Path) -> None:
    found = find_rails(tmp_path)
    assert (found.rails, found.notices, found.problem) == ((), (), "")


def test_unknown_rails_are_not_added_up(tmp_path: Path) -> None:
    monitor(tmp_path, {"VDD_GPU_SOC": (5000, 100), "VDD_CPU_CV": (5000, 100)})
    found = find_rails(tmp_path)
    assert found.rails == ()
    assert "VDD_CPU_CV, VDD_GPU_SOC" in found.problem


@pytest.mark.parametrize("text", JUNK.values(), ids=JUNK.keys())
@pytest.mark.parametrize("file", ["in1_input", "curr1_input"])
def test_a_rail_of_garbage_is_left_out_and_named(tmp_path: Path, file: str, text: bytes) -> None:
    folder = monitor(tmp_path, ORIN_NX)
    (folder / file).write_bytes(text)
    found = find_rails(tmp_path)
    assert found.rails == ()
    assert len(found.notices) == 1
    assert "VDD_IN" in found.notices[0]
    assert "VDD_CPU_GPU_CV, VDD_SOC" in found.problem
    assert (found.notices[0] + found.problem).isprintable()


def test_garbage_beside_the_whole_is_a_notice(tmp_path: Path) -> None:
    folder = monitor(tmp_path, ORIN_NX)
    (folder / "curr3_input").write_bytes(b"\xff\xfe")
    found = find_rails(tmp_path)
    assert [rail.name for rail in found.rails] == ["VDD_IN"]
    assert found.notices == ("The power rail 'VDD_SOC' was left out: 'curr3_input' holds no number.",)


def test_two_wrong_signs_make_no_power(tmp_path: Path) -> None:
    monitor(tmp_path, {"VDD_IN": (-5000, -1200)})
    assert "the voltage of 'VDD_IN' is below zero" in find_rails(tmp_path).notices[0]


@pytest.mark.parametrize("label", [b"\x1b[31mVDD_IN", b"\xff\xff", b"", b"V" * 5000, b"VDD\nIN"])
def test_labels_that_are_no_names(tmp_path: Path, label: bytes) -> None:
    folder = monitor(tmp_path, {"VDD_IN": (5000, 1200)})
    (folder / "in1_label").write_bytes(label)
    assert find_rails(tmp_path).rails == ()


@pytest.mark.parametrize("kind", ["denied", "gone", "folder", "pipe", "loop"])
def test_files_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    file = monitor(tmp_path, ORIN_NX) / "curr1_input"
    if kind == "denied" and os.geteuid() == 0:
        pytest.skip("root reads everything")
    if kind == "denied":
        file.chmod(0)
    else:
        file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)  # a reader of a pipe waits for ever
    elif kind == "loop":
        file.symlink_to(file)
    found = find_rails(tmp_path)
    assert found.rails == ()
    assert len(found.notices) == 1
    assert "'VDD_IN' was left out: 'curr1_input'" in found.notices[0]


def test_permission_errors_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monitor(tmp_path, ORIN_NX)
    opened = os.open

    def refuse(path: Path, flags: int) -> int:
        if Path(path).name == "in1_input":
            raise PermissionError(13, "Permission denied")
        return opened(path, flags)

    monkeypatch.setattr("qe_edge.system.power.os.open", refuse)
    assert "'in1_input' cannot be read, Permission denied" in find_rails(tmp_path).notices[0]


def test_a_second_rail_of_one_name_and_a_flood_of_monitors(tmp_path: Path) -> None:
    monitor(tmp_path, {"VDD_IN": (5000, 1000)}, "1-0040/hwmon/hwmon1")
    for number in range(2 * MOST_RAILS):
        monitor(tmp_path, {"VDD_IN": (5000, 9000)}, f"9-{number:04}/hwmon/hwmon1")
    found = find_rails(tmp_path)
    assert found.rails[0].watts() == pytest.approx(5.0)
    assert len(found.notices) == MOST_RAILS - 1


def test_the_integral_of_a_known_curve_at_uneven_times() -> None:
    times = [2 * (number / 400) ** 1.5 for number in range(401)]
    watts = [10 + 4 * math.sin(3 * t) for t in times]
    exact = 10 * 2 + 4 / 3 * (1 - math.cos(6))
    assert joules(times, watts) == pytest.approx(exact, rel=1e-4)
    assert joules([0.0, 4.0, 5.0], [3.0, 3.0, 5.0]) == 16.0  # a mean of the samples times 5 s would be 18.3
    assert joules([1.0], [3.0]) == 0


class Curve(Rail):
    """A rail whose power is a function of the time."""

    def watts(self) -> float:
        return 20 + 15 * math.cos(9 * time.perf_counter())


def test_a_meter_integrates_a_power_that_changes() -> None:
    with PowerMeter([Curve("VDD_IN", (), 1.0)], interval=0.004) as meter:
        begin = time.perf_counter()
        time.sleep(0.6)
        end = time.perf_counter()
    work = meter.work()
    exact = 20 * (end - begin) + 15 / 9 * (math.sin(9 * end) - math.sin(9 * begin))
    assert work.joules == pytest.approx(exact, rel=0.02)
    assert end - begin <= work.seconds < end - begin + 0.1
    assert work.samples > 20


def meter_while(folder: Path, act: Callable[[], None]) -> PowerMeter:
    with PowerMeter(find_rails(folder).rails, interval=0.005) as meter:
        time.sleep(0.1)
        act()
        time.sleep(0.1)
    return meter


def test_a_rail_that_disappears_in_the_middle(tmp_path: Path) -> None:
    file = monitor(tmp_path, ORIN_NX) / "curr1_input"
    meter = meter_while(tmp_path, file.unlink)
    with pytest.raises(ResourceError, match="could not be read to the end: 'curr1_input' cannot be read, No such file"):
        meter.work()


def test_a_rail_that_turns_to_garbage_in_the_middle(tmp_path: Path) -> None:
    file = monitor(tmp_path, ORIN_NX) / "in1_input"
    meter = meter_while(tmp_path, lambda: replace(file, b"\x00\x01"))
    with pytest.raises(ResourceError, match="'in1_input' holds no number"):
        meter.work()


def test_a_single_bad_reading_is_bridged(tmp_path: Path) -> None:
    monitor(tmp_path, ORIN_NX)
    readings: list[int] = []

    class Stumbling(Rail):
        def watts(self) -> float:
            readings.append(1)
            if len(readings) in (1, 4, 6, 7):
                raise ValueError("the bus was busy")
            return 6.0

    with PowerMeter([Stumbling("VDD_IN", (), 1.0)], interval=0.005) as meter:
        time.sleep(0.15)
    work = meter.work()
    assert work.joules == pytest.approx(6.0 * work.seconds)
    assert work.samples == len(readings) - 4


def test_too_few_samples_are_no_measurement(tmp_path: Path) -> None:
    monitor(tmp_path, ORIN_NX)
    with PowerMeter(find_rails(tmp_path).rails, interval=5.0) as meter:
        pass
    with pytest.raises(ResourceError, match="read 2 times, and 5 are needed"):
        meter.work()


def replace(file: Path, text: bytes) -> None:
    """Change a file in one step, as a monitor's is."""
    other = file.with_name("other")
    other.write_bytes(text)
    other.replace(file)
