"""TensorRT's backend without a GPU: stand-ins have the host's memory, and ONNX Runtime computes what an engine would.

What cannot be checked here is the library itself; what is checked is everything between it and the model.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import Change, edit_plan, environment, make_engines, write_again
from test_answers import NEW, Runner, asked, pixels_of

INPUT, ARTIFACT, RESOURCE = 2, 3, 5
MIB = 1 << 20


class GpuRunner(Runner):
    """The program `answer` on the stand-ins, which say at the end what is left on the GPU."""

    def __init__(
        self, build: Path, folder: Path, onnxruntime: Path, work: Path, *options: str, **variables: str
    ) -> None:
        super().__init__(build / "tests/answer", folder, onnxruntime, work)
        self._command += options
        self._report = work / "report.json"
        self._environment = environment(build, onnxruntime, STANDIN_REPORT=str(self._report), **variables)

    def run(self, requests: list[dict[str, Any]]) -> subprocess.CompletedProcess[bytes]:
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        return subprocess.run(
            self._command, input=lines.encode(), capture_output=True, env=self._environment, check=False
        )

    def __call__(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:  # type: ignore[override]
        done = self.run(requests)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        return [json.loads(line) for line in done.stdout.decode().split("\n")[:-1]]

    def refused(self) -> str:
        """What is said of a folder that is not opened."""
        done = self.run([])
        said = done.stderr.decode()
        assert done.returncode == 1, said[-3000:]
        assert said.count(". ") >= 1, said
        assert said.endswith(".\n"), said
        assert self.left()["blocks"] == 0
        return said

    def left(self) -> dict[str, int]:
        """Nothing of a driver that was not even loaded."""
        report: dict[str, int] = json.loads(self._report.read_text()) if self._report.exists() else {"blocks": 0}
        return report


Opened = Callable[..., GpuRunner]
Asked = tuple[list[dict[str, Any]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def made(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_engines(folder, tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def in_place(made: dict[str, Path]) -> Path:
    return made["in_place"]


@pytest.fixture(scope="module")
def requests_(folder: Path, build: Path, onnxruntime: Path, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Questions, and ONNX Runtime's answers."""
    runner = Runner(build / "tests/answer", folder, onnxruntime, tmp_path_factory.mktemp("questions"))
    asked_ = questions(runner)
    return asked_, runner(asked_)


@pytest.fixture
def changed(in_place: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(in_place, tmp_path / "engines"))


@pytest.fixture
def opened(build: Path, onnxruntime: Path, tmp_path: Path) -> Opened:
    return lambda folder, *options, **variables: GpuRunner(build, folder, onnxruntime, tmp_path, *options, **variables)


def questions(runner: Runner) -> list[dict[str, Any]]:
    """Conversations about pictures, several pictures at once, a picture that comes again, and texts."""
    shown = [runner.picture(pixels_of(f"images/evaluation/{number:04}.png")) for number in range(1, 6)]
    turns = [
        [
            [asked(shown[number], "what shape is in the image?")],
            [asked("and its color?")],
            [asked(shown[number], "sure?")],
        ]
        for number in range(3)
    ]
    turns.append([[asked(shown[3], "is it like", shown[4], "?")]])
    options = {"max_new_tokens": NEW}
    texts = ["the <|im_end|> circle", "what is a shape of the", "red"]
    return [
        *({"turns": each, "options": options} for each in turns),
        *({"text": text, "options": options | {"repetition_penalty": 1.5}} for text in texts),
    ]


@pytest.mark.parametrize("cache", ["in_place", "two_caches"])
def test_answers_are_those_of_onnxruntime(cache: str, made: dict[str, Path], requests_: Asked, opened: Opened) -> None:
    runner, (requests, expected) = opened(made[cache]), requests_
    assert runner(requests) == expected
    assert max(len(answer["ids"]) for found in expected for answer in found["answers"]) == NEW
    left = runner.left()
    assert (left["blocks"], left["contexts"], left["streams"]) == (0, 0, 0)
    assert left["done"] > 0


def test_the_callers_stream_is_used_and_nothing_is_taken_for_a_token(
    in_place: Path, requests_: Asked, opened: Opened
) -> None:
    requests, expected = requests_
    given, own = opened(in_place, "-", "-", "given"), opened(in_place)
    assert given(requests[-1:]) == expected[-1:]
    left = given.left()
    assert (left["blocks"], left["contexts"], left["streams"]) == (0, 1, 1)  # the program's own
    options = requests[-1]["options"] | {"max_new_tokens": 1}
    own([requests[-1] | {"options": options}])
    assert left["left"] == left["done"] > own.left()["done"] > 0
    assert own.left()["left"] == 0
    assert left["peak"] == own.left()["peak"]


def test_threads_take_turns(in_place: Path, build: Path, onnxruntime: Path) -> None:
    command = [build / "tests/threads", in_place, onnxruntime]
    done = subprocess.run(command, capture_output=True, env=environment(build, onnxruntime), check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def shorten(engines: Path, prompt: int) -> None:
    """Make the prefill's profile one of shorter prompts."""

    def shorter(profile: dict[str, Any]) -> None:
        for name, axis in (("inputs_embeds", 1), ("position_ids", 2), ("attention_mask", 1)):
            for shape in profile[name]:
                shape[axis] = min(shape[axis], prompt)

    edit_plan(engines, "language", lambda plan: shorter(plan["profiles"][0]))
    write_again(engines, lambda table: shorter(table["graphs"]["language"]["profiles"]["prefill"]))


def test_turns_beyond_the_longest_prompt_are_read_one_by_one(changed: Path, requests_: Asked, opened: Opened) -> None:
    requests, expected = requests_
    prompts = [answer["prompt"] for answer in expected[0]["answers"]]
    assert prompts[1] > prompts[0] + 1
    shorten(changed, prompts[0] + 1)
    assert opened(changed)(requests[:1]) == expected[:1]


def test_limits_are_said(changed: Path, opened: Opened) -> None:
    shorten(changed, 40)
    runner = opened(changed)
    picture = runner.picture(pixels_of("images/evaluation/0001.png"))
    found = runner(
        [
            {"turns": [[asked("a " * 60)]], "options": {"max_new_tokens": 4}},
            {"turns": [[asked("a " * 2000)]]},
            {"turns": [[asked(picture, "what shape is it?")]], "options": {"max_new_tokens": 2}},
        ]
    )
    assert "do not take a prompt of" in found[0]["error"]
    assert (
        "they were built for 40. Use a smaller picture or prompt, or build them with --max-prompt" in found[0]["error"]
    )
    assert "together at most 1024 fit" in found[1]["error"]
    assert [answer["status"] for answer in found[:2]] == [INPUT, INPUT]
    assert found[2]["answers"][0]["ids"]  # a refusal ends an answer, not the model


def test_a_larger_context_than_the_engines_have(changed: Path, opened: Opened) -> None:
    def lower(table: dict[str, Any]) -> None:
        table["max_context"] = 4096

    write_again(changed, lower)
    said = opened(changed, "-", "-", "own", "2000").refused()
    assert "The engines were built for 1024 tokens of prompt and answer, not 2000." in said
    assert "build them with --max-context 2000" in said
    assert "The model remembers 4096 tokens, not 9000" in opened(changed, "-", "-", "own", "9000").refused()


def test_a_picture_of_more_patches_than_the_engine_has(changed: Path, opened: Opened) -> None:
    edit_plan(changed, "visual", lambda plan: plan["profiles"][0]["pixel_values"][2].__setitem__(0, 3))
    runner = opened(changed)
    picture = runner.picture(pixels_of("images/evaluation/0001.png"))
    (found,) = runner([{"turns": [[asked(picture, "what shape is it?")]]}])
    assert found["status"] == INPUT
    assert "visual.engine' was not built for inputs of this size: 'pixel_values' is [" in found["error"]
    assert "at most [3, 4, 1176]. Use a smaller picture" in found["error"]


def exchange(name: str, key: str, value: object, kind: str = "inputs") -> Change:
    """Another dtype, name or shape of a tensor of an engine."""
    return lambda plan: next(entry for entry in plan[kind] if entry["name"] == name).update({key: value})


def no_sizes(plan: dict[str, Any]) -> None:
    del plan["profiles"][1]["attention_mask"]


KEY, OTHER = "past_key_values.0.key", "has another type or shape than the manifest's float16 [-1, 2, 1024, 32]"
HOSTILE: list[tuple[Change, str]] = [
    (exchange(KEY, "dtype", "float32"), OTHER),
    (exchange(KEY, "shape", ["batch", 2, 2048, 32]), OTHER),
    (exchange(KEY, "shape", ["batch", 2, 1024]), OTHER),
    (exchange("present.0.key", "shape", ["batch", 4, 1024, 32], "outputs"), OTHER),
    (lambda plan: plan.update(hosted=KEY), OTHER),
    (lambda plan: plan.update(packed=KEY), OTHER),
    (lambda plan: plan["profiles"].pop(), "has other optimization profiles than the manifest says"),
    (no_sizes, "has no sizes for 'attention_mask'"),
    (lambda plan: plan.update(full=True), "does not fit into the GPU's memory"),
    (lambda plan: plan.pop("graph"), "on this GPU: The engine plan file is not compatible with this version."),
    (lambda plan: plan.update(plugin=True), "Cannot find plugin: QELinear"),
]


@pytest.mark.parametrize(("change", "said"), HOSTILE, ids=[str(number) for number in range(len(HOSTILE))])
def test_an_engine_that_is_not_the_manifests(change: Change, said: str, changed: Path, opened: Opened) -> None:
    edit_plan(changed, "language", change)
    assert said in opened(changed).refused()


FAILING: list[tuple[Change, str, int]] = [
    (
        exchange("logits", "shape", ["batch", "elsewhere", 512], "outputs"),
        "depends on more than its inputs' sizes",
        ARTIFACT,
    ),
    (lambda plan: plan.update(fails="Out of\x1bmemory.\nmore"), "failed on the GPU: Out of memory.", RESOURCE),
]


@pytest.mark.parametrize(("change", "said", "status"), FAILING, ids=["size", "run"])
def test_a_run_that_fails_ends_the_answer(
    change: Change, said: str, status: int, changed: Path, opened: Opened
) -> None:
    edit_plan(changed, "language", change)
    (found,) = opened(changed)([{"text": "red", "options": {"max_new_tokens": 2}}])
    assert said in found["error"]
    assert found["status"] == status


def test_a_cache_of_another_size_than_it_is_kept(changed: Path, opened: Opened) -> None:
    """Engine and manifest agree, but on an output that is larger than the input that it is written over."""
    widen = exchange("present.0.key", "shape", ["batch", 2, 1024, 64], "outputs")
    edit_plan(changed, "language", widen)
    write_again(changed, lambda table: widen(table["graphs"]["language"]))
    (found,) = opened(changed)([{"text": "red", "options": {"max_new_tokens": 2}}])
    assert "writes 'present.0.key' in another size than it is kept" in found["error"]


WITHOUT: list[tuple[dict[str, str], str]] = [
    ({"LD_LIBRARY_PATH": ""}, "need an NVIDIA GPU, and the NVIDIA driver is not installed. Run them on such a machine"),
    ({"STANDIN_NO_GPU": "1"}, "need an NVIDIA GPU, and the NVIDIA driver finds none."),
    ({"STANDIN_TENSORRT_VERSION": "100001"}, "and later of that number, and 10.0.1 is installed."),
    ({"STANDIN_TENSORRT_VERSION": "990100"}, "and 99.1.0 is installed. Build it with the headers"),
    ({"STANDIN_TENSORRT_STARTS_NOT": "1"}, "does not start on this GPU: CUDA initialization failure with error: 35."),
]


@pytest.mark.parametrize(("variables", "said"), WITHOUT, ids=[said for _, said in WITHOUT])
def test_a_machine_that_cannot_run_engines(
    variables: dict[str, str], said: str, in_place: Path, opened: Opened
) -> None:
    done = opened(in_place, **variables).run([])
    assert done.returncode == 1, done.stderr.decode()[-3000:]
    assert said in done.stderr.decode()


def test_a_gpu_that_is_full(in_place: Path, opened: Opened) -> None:
    runner = opened(in_place, STANDIN_MEMORY=str(MIB))
    found = runner([{"text": "red"}, {"text": "red"}])
    assert [answer["error"] for answer in found] == [
        "The GPU's memory is full. Use smaller pictures, or close other programs."
    ] * 2
    assert [answer["status"] for answer in found] == [RESOURCE] * 2
    assert runner.left()["blocks"] == 0


def test_work_that_failed_on_the_gpu(in_place: Path, opened: Opened) -> None:
    (found,) = opened(in_place, STANDIN_FAILS="1")([{"text": "red"}])
    assert "The NVIDIA driver failed in cuStreamSynchronize with code 700. Look the code up" in found["error"]


LIBRARIES: list[tuple[tuple[str, ...], str]] = [
    (
        ("/nonexistent/libnvinfer.so",),
        "TensorRT cannot be loaded: /nonexistent/libnvinfer.so: cannot open shared object",
    ),
    (("libc.so.6",), "The library of TensorRT has no getInferLibVersion. Give the path of libnvinfer.so."),
    (("-", "-", "wrong"), "does not know the CUDA stream that was given. Give a CUstream"),
]


@pytest.mark.parametrize(("options", "said"), LIBRARIES, ids=[said for _, said in LIBRARIES])
def test_a_library_or_stream_that_is_none(options: tuple[str, ...], said: str, in_place: Path, opened: Opened) -> None:
    assert said in opened(in_place, *options).refused()


def test_the_plugin_is_loaded_where_the_engines_need_it(changed: Path, opened: Opened, tmp_path: Path) -> None:
    edit_plan(changed, "language", lambda plan: plan.update(plugin=True))
    built = {"sha256": "0" * 64, "layout_version": 4}
    write_again(changed, info=lambda table: table.update(plugin=built))
    plugin = tmp_path / "libqe_plugin.so"
    assert "There is no plugin library" in opened(changed, "-", str(plugin)).refused()
    plugin.write_text("something else")
    said = opened(changed, "-", str(plugin)).refused()
    assert "cannot load the plugin library" in said
    assert "invalid ELF header. Build it with 'qe-edge build-plugin'" in said
    assert "cannot load the plugin library 'libqe_plugin.so'" in opened(changed).refused()
    plugin.write_text("plugin")
    assert opened(changed, "-", str(plugin))([{"text": "red", "options": {"max_new_tokens": 2}}])[0]["answers"]


def leave_out(table: dict[str, Any]) -> None:
    visual = table["graphs"]["visual"]
    visual["inputs"].pop()
    del visual["profiles"]["default"]["position_ids"]


def rename(table: dict[str, Any]) -> None:
    visual = table["graphs"]["visual"]
    exchange("position_ids", "name", "places")(visual)
    visual["profiles"]["default"]["places"] = visual["profiles"]["default"].pop("position_ids")


def break_seal(engines: Path) -> None:
    path = engines / "engine.json"
    path.write_text(path.read_text().replace('"10.3"', '"10.4"'))


INFO: list[tuple[Callable[[Path], object], str]] = [
    (break_seal, "engine.json' was changed after it was written"),
    (
        lambda engines: write_again(engines, info=lambda table: table.update(manifest="0" * 64)),
        "describes other engines",
    ),
    (lambda engines: write_again(engines, info=lambda table: table.pop("plugin")), "a value is missing or of another"),
    (lambda engines: write_again(engines, info=lambda table: table.update(backend="a\x1bb")), "holds engines for 'a"),
    (
        lambda engines: write_again(engines, info=lambda table: table.update(backend="tensorrt_rtx")),
        "are for TensorRT-RTX, and this libqe_edge was built without it. Build it with -DQE_EDGE_TENSORRT_RTX",
    ),
    (
        lambda engines: write_again(
            engines,
            lambda table: table["graphs"]["language"]["profiles"].update(decode={"attention_mask": [[], [], []]}),
        ),
        "The engines' profile 'decode' has no number of tokens.",
    ),
    (
        lambda engines: write_again(engines, lambda table: table.update(max_context=512)),
        "The engines' profile 'decode' has no number of tokens.",
    ),
    (
        lambda engines: write_again(
            engines, lambda table: exchange(KEY, "shape", ["batch", 2, 99, 32])(table["graphs"]["language"])
        ),
        "has another size than their context",
    ),
    (lambda engines: write_again(engines, leave_out), "visual.engine' has other inputs and outputs than the manifest"),
    (lambda engines: write_again(engines, rename), "has no such tensor as the manifest's 'places'"),
]


@pytest.mark.parametrize(("damage", "said"), INFO, ids=[str(number) for number in range(len(INFO))])
def test_descriptions_that_are_wrong(
    damage: Callable[[Path], object], said: str, changed: Path, opened: Opened
) -> None:
    damage(changed)
    assert said in opened(changed).refused()
