"""Energy of a piece of work, from the power rails of a Jetson board.

The boards measure current and voltage of some rails with INA3221 monitors. Thor's developer kit has an INA238 at its
input too. Linux shows them as small files; the kernel's pages `hwmon/ina3221` and `hwmon/ina238` have names and units.
It has run on no Jetson: the tests make the files.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from qe_edge.system.errors import ResourceError, reason, shown_name

SYSTEM = Path("/sys")
INTERVAL = 0.02  # seconds from one sample to the next; an INA3221 as JetPack sets it has a new value about as often
MISSES = 3  # failures in a row that end a measurement; a bus that is busy once does not
FEWEST = 5  # samples of a measurement
LONGEST = 64  # bytes of a reading, and letters of a name
MOST_RAILS = 32
SHOWN = 160  # letters of the names of rails in a message
LEAST_WATTS, MOST_WATTS = -5.0, 1000.0  # of a rail; an idle one reads a little below zero, by its monitor's offset

# Rails that make up the whole, the first set that a board has. The others of a board are parts of these.
WHOLE = (
    ("VDD_IN",),  # Orin NX and Nano, Xavier NX, TX2: the module
    ("VIN",),  # Thor's developer kit: the module and the carrier board
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin: the module, whose memory is fed from the last
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # Thor on a carrier board without a monitor at its input
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
    ("POM_5V_IN",),  # Nano
)


@dataclass(frozen=True)
class Rail:
    """A power rail and the files of its monitor.

    Attributes:
        name: Name that the board's maker gave it, for example "VDD_IN".
        files: One file of a power, or the files of a voltage and of a current.
        unit: Watts of the product of the files' numbers when each is 1.
    """

    name: str
    files: tuple[Path, ...]
    unit: float

    def watts(self) -> float:
        """The power now.

        Raises:
            ValueError: If a file cannot be read or holds no number, or the power is none that a board can have.
        """
        numbers = [_number(file) for file in self.files]
        power = self.unit * math.prod(numbers)
        if any(number < 0 for number in numbers[:-1]):
            raise ValueError(f"the voltage of '{self.name}' is below zero")
        if not LEAST_WATTS <= power <= MOST_WATTS:
            raise ValueError(f"'{self.name}' reads {power:.4g} W, which no board uses")
        return power


@dataclass(frozen=True)
class Rails:
    """The rails that make up the power of a board.

    Attributes:
        rails: The rails; the power is the sum of theirs. Empty where `problem` says why, or where a machine has none.
        notices: A sentence for every rail that was left out.
        problem: Why a board with rails cannot be measured, "" where it can or has none.
    """

    rails: tuple[Rail, ...]
    notices: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Work:
    """Energy that was used while a meter ran.

    Attributes:
        joules: Energy.
        seconds: Time between the first and the last sample.
        samples: Number of samples.
    """

    joules: float
    seconds: float
    samples: int

    @property
    def watts(self) -> float:
        """Mean power."""
        return self.joules / self.seconds


def find_rails(root: Path = SYSTEM) -> Rails:
    """The rails that make up the whole power of this board.

    Args:
        root: The folder that Linux mounts as `/sys`.

    Example:
        >>> monitor = Path("sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3")
        >>> monitor.mkdir(parents=True)
        >>> for name, text in (("in1_label", "VDD_IN"), ("in1_input", "5000"), ("curr1_input", "1200")):
        ...     _ = (monitor / name).write_text(text)
        >>> [(rail.name, round(rail.watts(), 3)) for rail in find_rails(Path("sys")).rails]
        [('VDD_IN', 6.0)]
        >>> find_rails(Path("desktop")).rails
        ()
    """
    found: dict[str, Rail] = {}
    notices: list[str] = []
    for rail in _candidates(root / "bus/i2c/drivers"):
        if rail.name in found:
            notices.append(f"A second power rail '{rail.name}' was left out.")
            continue
        try:
            rail.watts()
        except ValueError as error:
            notices.append(f"The power rail '{rail.name}' was left out: {reason(error)}.")
            continue
        found[rail.name] = rail
    for names in WHOLE:
        if found.keys() >= set(names):
            return Rails(tuple(found[name] for name in names), tuple(notices))
    if not found and not notices:
        return Rails(())
    known = shown_name(", ".join(sorted(found)) or "none", SHOWN)
    return Rails((), tuple(notices), f"No known set of power rails can be read whole; those that can be: {known}.")


def joules(times: Sequence[float], watts: Sequence[float]) -> float:
    """The integral of a power by the trapezoidal rule, in joules.

    Args:
        times: Seconds at which the power was read, rising.
        watts: The power at these times.

    Example:
        >>> joules([0.0, 1.0, 3.0], [2.0, 4.0, 0.0])
        7.0
    """
    steps = zip(times, times[1:], watts, watts[1:], strict=False)
    return sum((later - earlier) * (first + second) / 2 for earlier, later, first, second in steps)


class PowerMeter:
    """Samples rails in a thread while the context is open.

    Every sample has the time at which it was read. The first and the last are taken where the context begins and ends.

    Args:
        rails: What to sample; the power is the sum.
        interval: Seconds from one sample to the next.
        clock: The time in seconds.

    Example:
        >>> _ = Path("power").write_text("3000")
        >>> with PowerMeter([Rail("VDD_IN", (Path("power"),), 1e-3)]) as meter:
        ...     time.sleep(0.15)
        >>> round(meter.work().watts, 6)
        3.0
    """

    def __init__(
        self, rails: Sequence[Rail], interval: float = INTERVAL, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._rails, self._interval, self._clock = tuple(rails), interval, clock
        self._times: list[float] = []
        self._watts: list[float] = []
        self._misses, self._last_miss = 0, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="power", daemon=True)

    def __enter__(self) -> PowerMeter:
        self._sample_now()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._sample_now()

    def work(self) -> Work:
        """What was measured while the context was open.

        Raises:
            ResourceError: If a rail could not be read to the end, or too few samples were taken.
        """
        if self._misses:
            raise ResourceError(f"{self._last_miss}.", "Look whether the monitor's files are there, and measure again.")
        if len(self._times) < FEWEST:
            raise ResourceError(
                f"The power was read {len(self._times)} times, and {FEWEST} are needed.", "Measure for a longer time."
            )
        return Work(joules(self._times, self._watts), self._times[-1] - self._times[0], len(self._times))

    def _run(self) -> None:
        due = self._clock()
        while self._misses < MISSES:
            due = max(due + self._interval, self._clock())  # where reading takes longer than the interval
            if self._over.wait(max(due - self._clock(), 0.0)):
                return
            self._sample()

    def _sample_now(self) -> None:
        """One good sample, which bounds the integral, unless the rails are gone."""
        before = len(self._times)
        while self._misses < MISSES and len(self._times) == before:
            self._sample()

    def _sample(self) -> None:
        """Read all rails; the time of the sample is the middle of the reading."""
        begin = self._clock()
        try:
            power = sum(rail.watts() for rail in self._rails)
        except ValueError as error:
            self._misses += 1
            self._last_miss = f"The power rails could not be read to the end: {reason(error)}"
            return
        self._misses = 0
        self._times.append((begin + self._clock()) / 2)
        self._watts.append(power)


def _candidates(drivers: Path) -> list[Rail]:
    """Every rail that a monitor names, at most `MOST_RAILS`, in the order of the files' names."""
    rails = []
    for label in _files(drivers, "ina3221/*/hwmon/hwmon*/in[123]_label"):  # in7 is a sum of shunts
        number = label.name[2]
        files = label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
        rails.append(Rail(_name(label), files, 1e-6))  # millivolts and milliamperes
    rails += [  # microwatts
        Rail(_name(power.with_name("label")) or "VIN", (power,), 1e-6)
        for power in _files(drivers, "ina238/*/hwmon/hwmon*/power1_input")
    ]
    rails += [  # milliwatts, of kernels before JetPack 5
        Rail(_name(label), (label.with_name(f"in_power{label.name[-1]}_input"),), 1e-3)
        for label in _files(drivers, "ina3221x/*/iio:device*/rail_name_[012]")
    ]
    return [rail for rail in rails if rail.name not in ("", "NC")][:MOST_RAILS]  # NC is not connected


def _files(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:  # a folder that may not be listed
        return []


def _name(label: Path) -> str:
    """The name in a file, "" where there is none that can be shown."""
    try:
        text = _read(label).decode("ascii").strip()
    except (OSError, ValueError):
        return ""
    return text if len(text) < LONGEST and re.fullmatch(r"[\w.+-]+( [\w.+-]+)*", text) else ""


def _number(file: Path) -> int:
    try:
        text = _read(file).strip()
    except OSError as error:
        raise ValueError(f"'{file.name}' cannot be read, {error.strerror or error}") from error
    if not re.fullmatch(rb"[+-]?[0-9]+", text):
        raise ValueError(f"'{file.name}' holds no number")
    return int(text)


def _read(file: Path) -> bytes:
    """The first bytes of a file. A pipe that nobody writes into does not stop it."""
    handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(handle, LONGEST)
    finally:
        os.close(handle)
