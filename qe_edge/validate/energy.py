"""Energy of an answer: the power of a board's rails while answers are made, and before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from qe_edge.budget.accounting import Amount, Count
from qe_edge.system.errors import ResourceError
from qe_edge.system.power import SYSTEM, PowerMeter, Work, find_rails

NO_RAILS = "no power rails"
LONGEST = 600  # letters of a sentence
Sentence = Annotated[str, Field(max_length=LONGEST)]
SETTLING, IDLE = 0.5, 1.0  # seconds: until the clocks are those of an idle board, and of the measurement


class Energy(BaseModel):
    """Energy of one answer, from the power rails of a board.

    Attributes:
        joules: Energy of an answer, the idle power's share included.
        above_idle: The same without it; noise can take it below zero.
        idle_watts: Power before the model was loaded.
        answers: Number of answers, one after the other.
        samples: How often the power was read meanwhile.
        rails: Rails whose sum it is.
        notices: A sentence for every rail that was left out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    joules: Amount
    above_idle: float
    idle_watts: Amount
    answers: Annotated[Count, Field(ge=1)]
    samples: Count
    rails: Annotated[list[Sentence], Field(min_length=1, max_length=64)]
    notices: Annotated[list[Sentence], Field(max_length=64)] = []


class Gauge:
    """Measures the idle power when it is made, and the energy of answers while `running` is open.

    On a machine without power rails it takes no time.

    Args:
        system: The folder that Linux mounts as `/sys`.
        settling: Seconds to wait before the idle power is measured.
        idle: Seconds of that measurement.

    Example:
        >>> gauge = Gauge(Path("desktop"))
        >>> with gauge.running():
        ...     answers = 3
        >>> gauge.energy(answers)
        'no power rails'
    """

    def __init__(self, system: Path = SYSTEM, settling: float = SETTLING, idle: float = IDLE) -> None:
        self._found = find_rails(system)
        self._problem = self._found.problem or ("" if self._found.rails else NO_RAILS)
        self._idle: Work | None = None
        self._work: Work | None = None
        if not self._problem:
            time.sleep(settling)
            with PowerMeter(self._found.rails) as meter:
                time.sleep(idle)
            self._idle = self._result(meter)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While it is open, answers are made and nothing else."""
        if self._problem:
            yield
            return
        with PowerMeter(self._found.rails) as meter:
            yield
        self._work = self._result(meter)

    def energy(self, answers: int) -> Energy | str:
        """Energy of one of the answers that were made, or one sentence that says why it is not known.

        Args:
            answers: How many were made while `running` was open.
        """
        if self._problem or self._idle is None or self._work is None:
            return " ".join((self._problem, *self._found.notices))[:LONGEST]
        idle = self._idle.watts
        return Energy(
            joules=self._work.joules / answers,
            above_idle=(self._work.joules - idle * self._work.seconds) / answers,
            idle_watts=idle,
            answers=answers,
            samples=self._work.samples,
            rails=[rail.name for rail in self._found.rails],
            notices=list(self._found.notices),
        )

    def _result(self, meter: PowerMeter) -> Work | None:
        try:
            work = meter.work()
        except ResourceError as error:
            self._problem = error.problem
            return None
        if work.joules < 0:  # the offset of monitors that measure nothing
            self._problem = f"The power rails read {work.watts:.3g} W on average, which is below zero."
            return None
        return work
