"""The stages one after the other, each on the folder that the one before has written, and all of them at once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qe_edge.calibration.sources import load_evaluation
from qe_edge.cli import main
from tests.cli.running import Outcome, Run, assert_two_lines

QUICK = ["--method", "rtn", "--modules", "merger", "--samples", "1"]
PICTURE = load_evaluation("demo")[1].image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and the graphs exported from it."""
    path = tmp_path_factory.mktemp("stages")
    for words in (
        ["quantize", "demo", "-o", path / "checkpoint", *QUICK],
        ["export", path, "-o", path / "onnx"],
    ):
        assert main([str(word) for word in words]) == 0
    return path


def answer(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.out.strip()


@pytest.mark.slow
def test_checkpoint_and_graphs_give_the_same_answer(cli: Run, folder: Path) -> None:
    words = ["--image", PICTURE, "--prompt", "what shape is in the image?"]
    from_graphs = cli("run", folder / "onnx", *words)
    from_checkpoint = cli("run", folder / "checkpoint", *words)
    assert answer(from_graphs) == answer(from_checkpoint) != ""
    assert "first token after" in from_graphs.err
    assert "in PyTorch" in from_checkpoint.err
    assert answer(cli("run", folder, *words)) == answer(from_graphs)


@pytest.mark.slow
def test_run_without_a_picture_and_with_a_short_answer(cli: Run, folder: Path) -> None:
    outcome = cli("run", folder / "onnx", "--prompt", "what color is it?", "--max-tokens", "1")
    assert outcome.code == 0, outcome.err
    assert ", 1 tokens" in outcome.err
    assert re.search(r"KV cache for \d+ tokens \d+\.\d MiB", outcome.err)
    short = cli("run", folder / "onnx", "--prompt", "what color is it?", "--max-context", "9")
    assert short.code == 2
    assert "together at most 9 fit" in short.err
    assert "picture" not in outcome.err.partition(": ")[2]


@pytest.mark.slow
def test_build_for_the_cpu_then_bench(cli: Run, folder: Path) -> None:
    built = cli("build", folder, "-o", folder / "engines" / "cpu")
    assert built.code == 0, built.err
    assert_two_lines(cli("build", folder, "-o", folder / "engines" / "cpu"), "cpu' is not empty", "--overwrite")
    outcome = cli("bench", folder, "--json", "--seconds", "1")
    assert outcome.code == 0, outcome.err
    assert {"prefill", "decode", "first_token"} <= set(json.loads(outcome.out)[0]["steps"])
    measured = json.loads(outcome.out)[0]
    decode, steps = measured["steps"]["decode"], measured["steps"]
    assert decode["lower"] <= decode["median"] <= decode["upper"] <= decode["p90"] <= decode["p99"]
    parts = sum(steps[step]["lower"] for step in ("encode", "visual", "merger", "prefill"))
    assert 0.7 * parts <= steps["first_token"]["p99"]
    assert 0 < measured["tokens_per_second"] <= 1000 / (0.75 * decode["lower"])  # three quarters take longer
    limits = ["--max-tokens", 3, "--seconds", "1", "--threads", 1, "--image", PICTURE, "--image", PICTURE]
    few = cli("bench", folder, "--json", *limits)
    assert few.code == 0, few.err
    found, whole = json.loads(few.out)[0], json.loads(outcome.out)[0]
    assert found["steps"]["decode"]["repeats"] == 3 * found["steps"]["prefill"]["repeats"]
    assert found["threads"] == 1
    assert found["prompt_tokens"] > whole["prompt_tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("original", [[], ["--original", "demo"]])
def test_bench_beyond_the_context(cli: Run, folder: Path, original: list[str]) -> None:
    outcome = cli("bench", folder / "onnx", "--max-tokens", 10**6, *original)
    assert outcome.code == 2
    assert "the answer up to 1000000; together at most" in outcome.err
    assert "Fix: Ask for at most" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_validate_then_report(cli: Run, folder: Path) -> None:
    outcome = cli("validate", "demo", folder, "-o", folder / "report.json", "--limit", "3")
    assert outcome.code == 0, outcome.err
    assert json.loads((folder / "report.json").read_text())["evaluation"]["samples"] == 3
    assert (folder / "report.html").read_text().startswith("<!")
    again = cli("report", folder, "-o", folder / "page.html")
    assert again.code == 0, again.err
    assert (folder / "page.html").read_text() == (folder / "report.html").read_text()
    assert_two_lines(cli("report", folder, "-o", folder / "page.html"), "exists", "--overwrite")


@pytest.mark.slow
def test_an_image_that_is_no_image(cli: Run, folder: Path) -> None:
    words = ["run", folder, "--prompt", "What is this?", "--image"]
    assert_two_lines(cli(*words, folder / "onnx" / "config.json"), "is not a picture", "PNG, JPEG or WebP")
    assert_two_lines(cli(*words, folder / "gone.png"), "There is no picture", "Check the path")


@pytest.mark.parametrize(
    ("words", "problem", "remedy"),
    [
        (["build", "nosuch", "-o", "x", "--target", "jetson-orin"], "needs the Python module tensorrt", "Jetson Orin"),
        (["build", "nosuch", "-o", "x", "--target", "jetson"], "no target 'jetson'", "Did you mean 'jetson-"),
        (["deploy", "demo", "-o", "x", "--target", "cpu", "--target", "jetson-orin"], "tensorrt", "Jetson Orin"),
        (["deploy", "demo", "-o", "x", "--target", "cpuu"], "no target 'cpuu'", "Did you mean 'cpu'?"),
        (["deploy", "demo", "-o", "x", "--evaluation", "nosuch"], "no calibration source 'nosuch'", "JSONL"),
        (["deploy", "demo", "-o", "x", "--scheme", "w5"], "no scheme 'w5'", "Known: "),
        (["build", "nosuch", "-o", "x"], "no folder 'nosuch'", "qe-edge export"),
        (["export", "nosuch", "-o", "x"], "no folder 'nosuch'", "qe-edge quantize"),
        (["run", "nosuch", "--prompt", "x"], "no folder 'nosuch'", "qe-edge build"),
        (["bench", "nosuch", "--threads", "0"], "--threads", "--help"),
        (["bench", "nosuch", "--max-tokens", "0"], "--max-tokens", "--help"),
        (["bench", "nosuch", "--seconds", "nan"], "--seconds", "--help"),
        (["bench", "nosuch"], "no folder 'nosuch'", "qe-edge build"),
        (["validate", "demo", "nosuch", "-o", "x.json"], "no folder 'nosuch'", "qe-edge quantize"),
        (["report", "nosuch.json", "-o", "x.html"], "nosuch.json'", "qe-edge validate"),
        (["validate", "demo", "x", "-o", "x.html"], "the page is written", "x.json"),
    ],
)
def test_mistakes_are_found_before_any_work(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], problem: str, remedy: str
) -> None:
    monkeypatch.chdir(tmp_path)
    # as on a machine without TensorRT and without a GPU
    monkeypatch.setattr("qe_edge.export.targets.find_spec", lambda name: None if name == "tensorrt" else name)
    monkeypatch.setattr("qe_edge.export.targets.compute_capability", lambda: None)
    assert_two_lines(cli(*words), problem, remedy)
    assert list(tmp_path.iterdir()) == []
