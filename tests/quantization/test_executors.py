"""Blocks whose problems are solved elsewhere: the same bits, whatever happens to the workers."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from qe_edge.layers.linear import quantized_linears
from qe_edge.methods import LinearProblem
from qe_edge.methods.checked import quantize_problem
from qe_edge.models.family import Block
from qe_edge.numerics.schemes import get_scheme
from qe_edge.quantization.executors import FarBlocks, open_workers, solve_groups
from qe_edge.quantization.quantizer import quantize
from qe_edge.quantization.ray_workers import RayWorkers, answer
from qe_edge.quantization.run_record import current_environment
from qe_edge.recipes.recipe import Recipe, make_recipe
from qe_edge.system import parallel
from qe_edge.system.errors import NumericalError, QENotice, RecipeError, ResourceError, TargetError, UnknownNameError
from qe_edge.system.version import VERSION

HERE = {**current_environment("cpu"), "qe_edge": VERSION}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many workers as the machine has cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe() -> Recipe:
    options = {"tokens": 128, "em_steps": 1}
    budget, calibration = {"bits": 4.5}, {"source": "demo", "samples": 2}
    return make_recipe(method="qe", scheme="w4a8", options=options, budget=budget, calibration=calibration)


def tensors(model: str, executor: str) -> dict[str, Tensor]:
    loaded, _ = quantize(model, recipe(), executor=executor, device="cpu")
    assert quantized_linears(loaded.model)
    return dict(loaded.model.state_dict())


def kill_one_worker(killed: list[int], over: threading.Event) -> None:
    """Kill the first worker that is at work, and ask this process to stop."""
    while not killed and not over.wait(0.005):
        with suppress(psutil.Error):  # one that is gone already
            for process in psutil.Process().children(recursive=True):
                if not killed and "ray::answer" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
                    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_ray_gives_the_same_bits_even_if_a_worker_is_killed(small: str) -> None:
    pytest.importorskip("ray")
    expected = tensors(small, "local")
    killed: list[int] = []
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda sign, _frame: asked.append(sign))
    over = threading.Event()
    killer = threading.Thread(target=kill_one_worker, args=(killed, over))
    killer.start()
    try:
        found = tensors(small, "ray")
    finally:
        over.set()
        killer.join()
        signal.signal(signal.SIGTERM, before)
    assert killed
    assert asked == [signal.SIGTERM]  # Ray's own handler would end this process
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class FakeRay:
    """Ray as far as it is used, in this process."""

    exceptions = SimpleNamespace(RayTaskError=type("RayTaskError", (Exception,), {}), RayError=OSError)
    cloudpickle = pickle

    def __init__(self, call: Callable[..., Any] = answer) -> None:
        self.call = call

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 3.0 * torch.get_num_threads()}

    def remote(self, **_choices: object) -> Callable[[object], SimpleNamespace]:
        return lambda _function: SimpleNamespace(remote=lambda *given: lambda: self.call(*given))

    def get(self, waiting: Callable[[], Any]) -> Any:  # noqa: ANN401 - as the call returns it
        return waiting()


def says() -> int:
    warnings.warn("Groups are smaller.", QENotice, stacklevel=1)
    warnings.warn("Groups are smaller.", QENotice, stacklevel=1)
    return 7


def fails() -> int:
    raise NumericalError("The weights hold NaN.", "Get sound ones.")


def test_what_a_worker_says_and_raises_arrives() -> None:
    workers = RayWorkers(FakeRay())
    assert workers.ahead == 3
    with pytest.warns(QENotice, match="Groups are smaller") as notices:
        assert workers.submit(says)() == 7
    assert len(notices) == 1
    with pytest.raises(NumericalError, match=r"hold NaN\. Get sound ones"):
        workers.submit(fails)()


def test_a_worker_that_computes_otherwise_is_refused() -> None:
    def elsewhere(work: bytes, environment: dict[str, object]) -> object:
        return answer(work, {**environment, "torch": "2.0.0"})

    with pytest.raises(TargetError, match=r"computes otherwise than this process \(torch: 2.0.0 here, .* there\)"):
        RayWorkers(FakeRay(elsewhere)).submit(says)()


@pytest.mark.parametrize("words", ["No module named 'torch'", "The remote function failed to import on the worker."])
def test_a_worker_without_our_packages_is_said(words: str) -> None:
    def lacks(*_given: object) -> object:
        raise FakeRay.exceptions.RayTaskError(f"RaySystemError: System error: {words}")

    with pytest.raises(TargetError, match=r"cannot load QE-Edge: (No module named 'torch'|failed to import)\. Install"):
        RayWorkers(FakeRay(lacks)).submit(says)()


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    def broken(*_given: object) -> object:
        raise FakeRay.exceptions.RayTaskError("ZeroDivisionError: division by zero")

    with pytest.raises(FakeRay.exceptions.RayTaskError, match="division by zero"):
        RayWorkers(FakeRay(broken)).submit(says)()


def test_lost_workers_are_said() -> None:
    def lost(*_given: object) -> object:
        raise OSError("The node died")

    with pytest.raises(ResourceError, match=r"was lost 4 times: The node died. .* --resume"):
        RayWorkers(FakeRay(lost)).submit(says)()


def test_a_worker_keeps_the_number_of_threads_that_it_is_told() -> None:
    before = torch.get_num_threads()
    try:
        assert answer(pickle.dumps(torch.get_num_threads), {**HERE, "threads": before + 1}).result == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "values", "device", "error", "words"),
    [
        ("dask", {}, "cpu", UnknownNameError, "There is no executor 'dask'"),
        ("ray:", {}, "cpu", UnknownNameError, "There is no executor 'ray:'"),
        ("array:1", {}, "cpu", UnknownNameError, "There is no executor 'array:1'"),
        (3, {}, "cpu", UnknownNameError, "There is no executor '3'"),
        ("ray", {"flow": "sequential"}, "cpu", RecipeError, "needs the quantized blocks before it"),
        ("ray", {"method": "loaq"}, "cpu", RecipeError, "needs the quantized blocks before it"),
        ("ray", {"method": "llmqat"}, "cpu", RecipeError, "needs the quantized blocks before it"),
        ("ray", {}, "cuda", TargetError, "Workers compute on CPUs, and the device is cuda"),
    ],
)
def test_what_workers_cannot_do_is_refused_before_the_model_is_looked_for(
    name: str,
    values: dict[str, Any],
    device: str,
    error: type[Exception],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("executors", "quantizer"):
        monkeypatch.setattr(f"qe_edge.quantization.{module}.choose_device", torch.device)
    with pytest.raises(error, match=words):
        quantize("nowhere", make_recipe(**{"method": "gptq", **values}), executor=name, device=device)


def test_without_ray_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(TargetError, match=r"Ray is not installed. Run: pip install 'qe-edge\[ray\]'"):
        quantize("nowhere", make_recipe(method="rtn"), executor="ray", device="cpu")


def test_where_no_cluster_is_the_address_is_said() -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999"):
        with (
            pytest.raises(TargetError, match=f"No cluster of Ray answers at '{address}': .*'ray start --head'"),
            open_workers(f"ray:{address}"),
        ):
            pass


def test_a_group_has_the_threads_that_it_has_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of one thread and of two differ in their last bits."""
    monkeypatch.setattr(parallel, "SMALL", 40)
    monkeypatch.setattr(parallel, "MEDIUM", 40)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        method = make_recipe(method="rtn").build_method()
        problems = [LinearProblem("layer", torch.ones(4, 8), get_scheme("w4a8"), None, 0) for _ in range(4)]
        found = solve_groups(method, [problems[:1], problems[1:3], problems[3:]], lambda *_: torch.get_num_threads())
        assert found == [1, 2, 2, 1]  # the two of one group are 64 weights, and the others 32
    finally:
        torch.set_num_threads(threads)


class Counting:
    """Workers that note how many pieces of work are on their way."""

    ahead = 2

    def __init__(self) -> None:
        self.waiting = self.most = 0

    def submit(self, work: Callable[[], Any]) -> Callable[[], Any]:
        self.waiting += 1
        self.most = max(self.most, self.waiting)

        def result() -> Any:  # noqa: ANN401 - as the work returns it
            self.waiting -= 1
            return work()

        return result


def test_blocks_on_their_way_are_few_and_come_back_in_order() -> None:
    """Their weights and statistics are in memory until then."""
    workers, method, seen = Counting(), make_recipe(method="rtn").build_method(), list[str]()
    blocks = FarBlocks(workers, method, quantize_problem, lambda block, _solved: seen.append(block.name))
    names = [f"layers.{number}" for number in range(7)]
    for name in names:
        blocks.send(Block(name, torch.nn.Identity(), group="language"), [])
    assert workers.most == workers.ahead + 1
    assert seen == names[:4]
    blocks.finish()
    assert seen == names
    assert workers.waiting == 0
