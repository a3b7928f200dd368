"""Workers of a Ray cluster, which has to compute as this process does, to the last bit.

What is sent is pickled: whoever can reach a Ray cluster runs code on it. It is as trusted as this machine.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from qe_edge.quantization.run_record import current_environment, environment_changes, in_one_line
from qe_edge.system.errors import QEError, QENotice, ResourceError, TargetError, reason
from qe_edge.system.version import VERSION

Result = TypeVar("Result")
TRIES = 3  # further tries of a piece of work whose worker was lost
CONNECT_SECONDS = 5.0
INSTALL = "Run: pip install 'qe-edge[ray]'."


@dataclass(frozen=True)
class Answer:
    """What a worker sends back.

    Attributes:
        result: The result, if there is one.
        error: The error that the work raised on purpose.
        notices: What it has to say to the user.
        differences: What makes the worker compute otherwise than the process that asks; the work is not done then.
    """

    result: Any = None
    error: QEError | None = None
    notices: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()


class RayWorkers:
    """The workers of a cluster that Ray is connected to.

    Args:
        ray: The module.

    Example:
        >>> import ray  # doctest: +SKIP
        >>> ray.init()  # doctest: +SKIP
        >>> RayWorkers(ray).submit(list)()  # doctest: +SKIP
        []
    """

    def __init__(self, ray: Any) -> None:  # noqa: ANN401 - an optional package
        threads = torch.get_num_threads()
        self._ray = ray
        self._call = ray.remote(num_cpus=threads, max_retries=TRIES)(answer)
        self._environment = _environment()
        self.ahead = max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)

    def submit(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Begin a piece of work.

        Raises:
            TargetError: When its result is asked for, if the worker lacks QE-Edge or computes otherwise.
            ResourceError: Likewise, if the worker was lost, and those that tried again too.
            QEError: As the work raises.
        """
        waiting = self._call.remote(self._ray.cloudpickle.dumps(work), self._environment)
        return lambda: self._result(waiting)

    def _result(self, waiting: object) -> Any:  # noqa: ANN401 - as the work returns it
        try:
            found = self._ray.get(waiting)
        except self._ray.exceptions.RayTaskError as error:
            lacking = re.search(r"No module named '[\w.]+'|failed to import", str(error))
            if lacking is None:
                raise  # a fault of ours: with its traceback
            raise TargetError(
                f"A worker of Ray cannot load QE-Edge: {lacking[0]}.",
                f"Install QE-Edge {VERSION} with the extra 'quantize' on every machine of the cluster.",
            ) from error
        except self._ray.exceptions.RayError as error:
            raise ResourceError(
                f"A worker of Ray was lost {TRIES + 1} times: {reason(error)}.",
                "Look at the memory of its machines, then repeat the command with --resume: finished blocks are kept.",
            ) from error
        if found.differences:
            raise TargetError(
                f"A worker of Ray computes otherwise than this process ({in_one_line(found.differences)}), which would "
                "change the last bits of the results.",
                "Install the same versions there, and set OMP_NUM_THREADS alike.",
            )
        for notice in found.notices:
            warnings.warn(notice, QENotice, stacklevel=2)
        if found.error is not None:
            raise found.error
        return found.result


def answer(work: bytes, environment: dict[str, object]) -> Answer:
    """What a worker does.

    Args:
        work: A pickled function without arguments.
        environment: What the asking process computes with.

    Example:
        >>> import pickle
        >>> answer(pickle.dumps(list), _environment()).result
        []
        >>> answer(pickle.dumps(list), {**_environment(), "qe_edge": "0.0.1"}).differences
        ('qe_edge: 0.0.1 here, 0.1.0 there',)
    """
    torch.set_num_threads(int(str(environment["threads"])))
    now = _environment()
    differences = environment_changes({"environment": environment}, {"environment": now})
    if differences:
        return Answer(
            differences=tuple(one.replace(" then, ", " here, ").replace(" now", " there") for one in differences)
        )
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            result, error = pickle.loads(work)(), None  # noqa: S301 - from the process that started this one
        except QEError as found:
            result, error = None, found
    notices = tuple(dict.fromkeys(str(one.message) for one in raised if issubclass(one.category, QENotice)))
    return Answer(result, error, notices)


def import_ray() -> Any:  # noqa: ANN401 - an optional package
    """The module.

    Raises:
        TargetError: If it is not installed.

    Example:
        >>> import_ray().__name__  # doctest: +SKIP
        'ray'
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        import ray  # noqa: PLC0415 - an optional package
    except ImportError as error:
        raise TargetError("Ray is not installed.", INSTALL) from error
    return ray


@contextmanager
def ray_workers(address: str) -> Iterator[RayWorkers]:
    """Workers of the cluster at an address, or of one that is started here and stopped at the end if it is empty.

    Raises:
        TargetError: If Ray is not installed, or no cluster answers.

    Example:
        >>> with ray_workers("") as workers:  # doctest: +SKIP
        ...     workers.submit(list)()
        []
    """
    ray = import_ray()
    try:
        _reach(address)
        with _own_signals():
            ray.init(
                address=address or "local",
                include_dashboard=False if not address else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except Exception as error:  # Ray raises a dozen kinds
        raise TargetError(
            f"No cluster of Ray answers at '{address or 'this machine'}': {reason(error)}.",
            "Start one with 'ray start --head', and give the address that it prints. If it asks for a token, set "
            "RAY_AUTH_MODE=token.",
        ) from error
    try:
        yield RayWorkers(ray)
    finally:
        ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what this process does when it is asked to stop: Ray would abort on SIGTERM."""
    before = {sign: signal.getsignal(sign) for sign in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for sign, handler in before.items():
                signal.signal(sign, handler or signal.SIG_DFL)


def _reach(address: str) -> None:
    """Refuse at once an address where nothing listens; Ray tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _environment() -> dict[str, object]:
    return {**current_environment("cpu"), "qe_edge": VERSION}
