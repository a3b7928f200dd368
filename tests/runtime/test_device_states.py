"""States of layers where a GPU would keep them: TensorRT's session and ONNX Runtime's CUDA session on stand-ins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from qe_edge.cli.build_work import _gpu_memory
from qe_edge.export import build
from qe_edge.export.build import build_engines
from qe_edge.export.lowering.cuda import lower_for_cuda
from qe_edge.models.family import TEXT, Sample
from qe_edge.runtime.cache import right_places, take_tokens
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.runtime.ort_cuda_session import OrtBuffer, OrtDevice
from qe_edge.runtime.pipeline import Pipeline
from qe_edge.runtime.plugin_library import FILE, OPERATOR_FILE
from qe_edge.runtime.sessions import Array
from qe_edge.runtime.tensorrt_session import Buffer
from qe_edge.system.errors import ArtifactError
from tests.runtime.conftest import StateExports
from tests.runtime.host_tensorrt import install, lowered_engines
from tests.sealing import seal

KINDS = ("tensorrt", "tensorrt in place", "cuda")
ON_CPU = OrtDevice(None, "CPUExecutionProvider", "cpu", {})
PROMPTS = [Sample(None, "is there a red shape in the image? " * 2, kind=TEXT), Sample(None, "why?", kind=TEXT)]
ASKED = [Sample(None, "what color is the shape?"), Sample(None, "why?"), Sample(None, "what color is it, and why?")]
Load = Callable[..., VisionLanguageEngine]


@pytest.fixture(scope="module", params=["lfm2", "qwen3.5"])
def folder(request: pytest.FixtureRequest, state_exports: StateExports) -> Path:
    return state_exports(request.param)


@pytest.fixture(scope="module", params=KINDS)
def engines(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines as they are built for GPUs, with layers in standard operators."""
    out = tmp_path_factory.mktemp("engines") / "engines"
    if request.param != "cuda":
        return lowered_engines(folder / "onnx", out, in_place=request.param.endswith("place"))
    for name in (FILE, OPERATOR_FILE):
        (out.parent / name).write_bytes(b"a library")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "check_forms", lambda *_: None)
        patch.setattr(build, "lower_for_cuda", lambda model: lower_for_cuda(model, plugin=False))
        return build_engines(folder / "onnx", out, "cuda", plugin_library=out.parent / FILE)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Opens engines on a machine that seems to have a GPU; every byte of its memory goes back."""
    driver, options = install(monkeypatch), ort.SessionOptions

    def exact_options() -> ort.SessionOptions:
        made = options()
        made.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        return made

    monkeypatch.setattr(ort, "SessionOptions", exact_options)
    monkeypatch.setattr("qe_edge.runtime.backends.open_device", lambda _info, _library=None: ON_CPU)
    yield VisionLanguageEngine.load
    assert driver.blocks == {}


@pytest.fixture(scope="module")
def exact(folder: Path) -> VisionLanguageEngine:
    return VisionLanguageEngine.load(folder / "onnx", threads=1)


def place(array: Array) -> int:
    assert isinstance(array, Buffer | OrtBuffer)
    return array.pointer if isinstance(array, Buffer) else int(array.value.data_ptr())


def rows_of(engine: VisionLanguageEngine) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings, positions and lengths of two prompts of different lengths, right-padded."""
    encoded = engine.encode(PROMPTS)
    places = right_places(encoded.attention_mask)
    embeds = take_tokens(engine.embed(encoded.input_ids), places, 0)
    return embeds, take_tokens(engine.family.position_ids(encoded), places, 0), encoded.attention_mask.sum(1)


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_logits_and_answers_are_those_of_the_cpu(engines: Path, load: Load, exact: VisionLanguageEngine) -> None:
    engine = load(engines)
    encoded = exact.encode(ASKED, answers=True)
    valid = encoded.attention_mask == 1
    assert apart(engine.logits(encoded)[valid], exact.logits(encoded)[valid]) < 2e-3
    asked = exact.encode(ASKED)
    assert engine.generate_ids(asked, 6) == exact.generate_ids(asked, 6)


def test_a_state_has_two_buffers_in_float32_that_take_turns(engines: Path, load: Load) -> None:
    engine = load(engines)
    encoded = engine.encode(ASKED[:1])
    logits, state = engine.prefill(encoded, None, 8)
    cache = state.cache
    assert cache.states == tuple(name for name in cache.past if not name.endswith(("key", "value")))
    types = {name: array.dtype.name for name, array in cache.past.items()}
    assert all(kind == ("float32" if name in cache.states else "float16") for name, kind in types.items())
    before = [(place(cache.past[name]), place(cache.present[name.replace("past_key_values", "present")]))
              for name in cache.states]  # fmt: skip
    assert all(read != write for read, write in before)
    engine.decode(state, engine.next_tokens(logits, state))
    after = [(place(cache.present[name.replace("past_key_values", "present")]), place(cache.past[name]))
             for name in cache.states]  # fmt: skip
    assert after == before


def test_memory_is_known_before_it_is_taken(engines: Path, load: Load) -> None:
    engine = load(engines)
    pipeline = Pipeline(engine)
    cache = engine.new_cache(1, pipeline.slot_tokens)
    assert pipeline.slot_bytes == cache.nbytes
    states = sum(4 * int(np.prod(cache.past[name].shape)) for name in cache.states)
    grown = sum(2 * int(np.prod(array.shape)) for name, array in cache.past.items() if name not in cache.states)
    assert cache.nbytes == 2 * states + (1 if engine.manifest.kv.in_place else 2) * grown


@pytest.mark.parametrize("first", [(5, 1), (1, 2), (7, 2)], ids=str)
def test_pieces_of_rows_of_different_lengths_give_what_the_whole_gives(
    engines: Path, load: Load, first: tuple[int, int]
) -> None:
    engine = load(engines)
    embeds, positions, lengths = rows_of(engine)
    wanted = engine.extend(engine.new_cache(2, 64), embeds, positions, lengths)
    cache, start = engine.new_cache(2, 64), np.array(first)
    most = int(start.max())
    engine.extend(cache, embeds[:, :most], positions[:, :most], start)
    rest = lengths - start
    places = np.minimum(start[:, None] + np.arange(rest.max()), embeds.shape[1] - 1)
    found = engine.extend(cache, take_tokens(embeds, places, 0), take_tokens(positions, places, 0), rest)
    assert apart(found, wanted) < 1e-4


def test_an_emptied_cache_holds_nothing_of_its_tokens(engines: Path, load: Load) -> None:
    engine = load(engines)
    embeds, positions, lengths = rows_of(engine)
    cache = engine.new_cache(2, 64)
    wanted = engine.extend(cache, embeds, positions, lengths)
    cache.truncate(0)
    assert np.array_equal(engine.extend(cache, embeds, positions, lengths), wanted)


def test_turns_and_earlier_prompts_change_no_answer(engines: Path, load: Load) -> None:
    engine = load(engines)
    alone = [engine.generate_ids(engine.encode([sample]), 6)[0] for sample in ASKED]
    pipeline = Pipeline(engine)
    for index in (0, 1, 2, 1, 0, 0):
        assert list(pipeline(ASKED[index], max_new_tokens=6).token_ids) == alone[index]
    with pipeline.conversation() as chat:
        first = chat("what color is the shape?", max_new_tokens=2)
        second = chat("why?", max_new_tokens=3)
    assert second.timings.reused_tokens == first.timings.prompt_tokens + first.timings.answer_tokens - 1


@pytest.mark.parametrize("engines", ["cuda"], indirect=True)
def test_steps_are_recorded_for_both_orders_of_the_buffers(
    engines: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph has fixed addresses, so that two of them take turns."""
    numbers: list[int] = []
    add = ort.RunOptions.add_run_config_entry

    def noted(options: ort.RunOptions, key: str, value: str) -> None:
        numbers.append(int(value))
        add(options, key, value)

    monkeypatch.setattr(ort.RunOptions, "add_run_config_entry", noted)
    engine = load(engines, cuda_graph=True)
    logits, state = engine.prefill(engine.encode(ASKED[:1]), None, 12)
    for _ in range(6):
        logits = engine.decode(state, engine.next_tokens(logits, state))
    assert numbers == [-1, -1, -1, 0, 1, 0, 1]
    assert engine.generate_ids(engine.encode(ASKED), 6) == load(engines).generate_ids(engine.encode(ASKED), 6)


@pytest.mark.parametrize("engines", ["cuda"], indirect=True)
def test_what_the_build_says_of_states(engines: Path, load: Load) -> None:
    cache = load(engines).new_cache(1, 64)
    size = 2 * sum(4 * int(np.prod(cache.past[name].shape)) for name in cache.states)
    assert f" for 1000 tokens and the states of its layers {size / 1024:.1f} KiB." in _gpu_memory(engines)


@pytest.mark.parametrize("engines", KINDS[:2], indirect=True)
@pytest.mark.parametrize("kind", ["inputs", "outputs"])
def test_an_engine_whose_states_are_not_the_manifests_is_refused(
    engines: Path, load: Load, tmp_path: Path, kind: str
) -> None:
    changed = Path(shutil.copytree(engines, tmp_path / "engines"))
    values: dict[str, Any] = json.loads((changed / "manifest.json").read_text())
    name = ("past_key_values" if kind == "inputs" else "present") + ".0.conv"
    spec = next(spec for spec in values["graphs"]["language"][kind] if spec["name"] == name)
    spec["shape"][1] -= 1
    (changed / "manifest.json").write_text(json.dumps(values))
    seal(changed)
    with pytest.raises(ArtifactError, match=rf"'{name}' of '.*language\.engine' is .* the manifest says"):
        load(changed)
