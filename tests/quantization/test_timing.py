"""The predicted time of a quantization, by a clock that only the measured work moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qe_edge.models.family import TEXT, Sample
from qe_edge.models.loading import load_model
from qe_edge.models.streaming import Chain
from qe_edge.quantization import timing
from qe_edge.quantization.job import make_job
from qe_edge.quantization.side_by_side import SideBySide
from qe_edge.quantization.timing import predicted_seconds
from qe_edge.quantization.walk import BlockWalk
from qe_edge.recipes.recipe import make_recipe
from tests.small_models import write_small_llama

SMALL = {"tokens": 64, "em_steps": 0}
TEXTS = [Sample(None, "A text.", kind=TEXT), Sample(None, "Is it?", "No.")]


class Clock:
    """Seconds, which pass in the functions that `costs` wraps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: dict[str, list[str]] = {}
        self._patch = monkeypatch.setattr
        self._patch(timing.time, "perf_counter", lambda: self.now)

    def costs(self, name: str, seconds: Callable[[str], float]) -> None:
        work = getattr(timing, name)

        def wrapped(*given: Any) -> object:  # noqa: ANN401
            block = next((part.name for part in given if hasattr(part, "group")), "")
            self.calls.setdefault(name, []).append(block)
            self.now += seconds(block)
            return work(*given)

        self._patch(timing, name, wrapped)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_one_block_of_every_kind_stands_for_all(clock: Clock) -> None:
    groups = {block.name: block.group for block in load_model("demo").family.blocks(load_model("demo").model)}
    each = {"visual": 3.0, "merger": 5.0, "language": 10.0}
    clock.costs("quantize_block", lambda name: each[groups[name]])
    recipe = make_recipe(method="rtn", modules=tuple(each), calibration={"samples": 2})
    seconds = predicted_seconds(make_job("demo", recipe), device="cpu")
    assert seconds == sum(each[group] for group in groups.values())
    assert sorted(groups[name] for name in clock.calls["quantize_block"]) == sorted(each)


def test_a_quick_block_is_measured_when_everything_is_warm(clock: Clock) -> None:
    times = iter([1.5, 1.0])  # the first loads a library
    clock.costs("quantize_block", lambda _name: next(times))
    recipe = make_recipe(method="rtn", calibration={"samples": 1})
    assert predicted_seconds(make_job("demo", recipe), device="cpu") == 1.5 + 1.0 + 4 * 1.0 - 2.5
    assert len(clock.calls["quantize_block"]) == 2


def test_gradients_of_one_batch_and_candidates_of_one_block(clock: Clock) -> None:
    clock.costs("measure_gradients", lambda _name: 7.0)
    clock.costs("measure_block", lambda _name: 20.0)
    clock.costs("quantize_block", lambda _name: 1.0)  # quick, and yet no block without a choice is taken
    recipe = make_recipe(method="qe", budget={"bits": 4.6}, options=SMALL, calibration={"samples": 17})
    assert predicted_seconds(make_job("demo", recipe), device="cpu") == 3 * 7.0 + 4 * 20.0 + 4 * 1.0
    assert clock.calls["quantize_block"] == clock.calls["measure_block"]


def test_a_head_after_the_only_block_has_its_inputs(clock: Clock, tmp_path: Path) -> None:
    clock.costs("quantize_block", lambda _name: 4.0)
    clock.costs("quantize_head", lambda _name: 30.0)
    folder = write_small_llama(tmp_path, num_hidden_layers=1)
    job = make_job(str(folder), make_recipe(method="rtn", head="int4"), TEXTS)
    assert predicted_seconds(job, device="cpu") == 4.0 + 30.0


def test_a_rotation_and_both_models_are_part_of_the_work(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.costs("rotate_language_model", lambda _name: 5.0)
    folder, given = str(write_small_llama(tmp_path)), []
    monkeypatch.setattr(timing, "quantize_block", lambda *words: given.append(words[2]) or pass_on(*words))
    assert predicted_seconds(make_job(folder, make_recipe(method="quarot"), TEXTS), device="cpu") == 5.0
    assert given.pop() is None
    assert predicted_seconds(make_job(folder, make_recipe(method="loaq"), TEXTS), device="cpu") == 0.0
    assert isinstance(given.pop(), SideBySide)


def pass_on(
    walk: BlockWalk, _problems: object, _both: object, _folder: object, chain: Chain, position: int, _block: object
) -> None:
    """A block that takes no time."""
    walk.hand_on(chain, position, chain.hidden)


def test_the_head_counts_once(clock: Clock) -> None:
    clock.costs("quantize_block", lambda _name: 4.0)
    clock.costs("quantize_head", lambda _name: 30.0)
    recipe = make_recipe(method="rtn", head="int4", calibration={"samples": 1})
    assert predicted_seconds(make_job("demo", recipe), device="cpu") == 4 * 4.0 + 30.0


@pytest.mark.parametrize("method", ["loaq", "mbq", "quarot", "awq"])
def test_every_way_of_quantizing_has_a_time(method: str, tmp_path: Path) -> None:
    folder = write_small_llama(tmp_path)
    before = sorted(tmp_path.iterdir())
    job = make_job(str(folder), make_recipe(method=method), TEXTS)
    assert predicted_seconds(job, device="cpu") > 0
    assert sorted(tmp_path.iterdir()) == before
