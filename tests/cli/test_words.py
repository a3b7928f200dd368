"""What is typed and what is printed: repeated options, bytes that are no text, streams that take nothing."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from qe_edge.cli.application import COMMANDS, application
from qe_edge.cli.outcome import run_reporting
from qe_edge.models.quantized import load_quantized
from qe_edge.models.samples import Sample, Turn
from qe_edge.runtime.engine import VisionLanguageEngine
from qe_edge.system.errors import CommonNotice, InputError
from qe_edge.validate.subjects import TorchSubject
from tests.cli.running import Run, assert_two_lines
from tests.conftest import Exported


def test_a_single_option_given_twice_is_refused_by_every_command(cli: Run) -> None:
    checked = 0
    for name in COMMANDS:
        command = application.get_command(click.Context(application), name)
        assert command is not None
        for option in command.params:
            if not isinstance(option, click.Option) or option.multiple or option.is_flag:
                continue
            words = [word for spelled in (option.opts[-1], option.opts[0]) for word in (spelled, "1")]
            problem = f"{option.opts[-1]} is given 2 times; give it once"
            assert_two_lines(cli(name, "x", *words), problem, f"qe-edge {name} --help")
            checked += 1
    assert checked > 40


def test_flags_and_lists_may_be_repeated() -> None:
    command = application.get_command(click.Context(application), "quantize")
    assert command is not None
    words = ["demo", "-o", "out", "--dry-run", "--dry-run", "--verbose", "--verbose", "--set", "a=1", "--set", "b=2"]
    assert command.make_context("quantize", words).params["settings"] == ("a=1", "b=2")


@pytest.mark.parametrize(
    "words",
    [("run", "x", "--prompt", "caf\udce9"), ("quantize", "demo", "-o", "z\udcff"), ("export", "m\udc80", "-o", "x")],
)
def test_bytes_that_are_no_text(cli: Run, words: tuple[str, ...]) -> None:
    assert_two_lines(cli(*words), "on the command line holds bytes that are no text", "LANG=C.UTF-8")


@pytest.mark.parametrize("text", ["half \ud83d", "bytes \udcff\udc80", "\0\x1b[31m\u202e", "漢字 🙂", "x" * 10**6])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_error_is_told_on_any_stream(monkeypatch: pytest.MonkeyPatch, text: str, encoding: str) -> None:
    def fail() -> None:
        click.echo(text)
        raise InputError(text, text)

    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert run_reporting(fail, [text]) == 2
    streams["stderr"].flush()
    lines = streams["stderr"].buffer.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line[:7] for line in lines] == [b"Error: ", b"  Fix: "]


class Broken(io.StringIO):
    """A stream that nobody reads."""

    def write(self, _text: str) -> int:
        raise OSError("No space left on device")


@pytest.mark.parametrize("stderr", [None, Broken()])
def test_an_error_that_cannot_be_told_keeps_its_code(
    monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO | None
) -> None:
    def fail() -> None:
        raise InputError("a", "b")

    monkeypatch.setattr(sys, "stderr", stderr)
    assert run_reporting(fail, ["run", "--verbose"]) == 2


def test_a_defect_with_any_text_is_written_to_its_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail() -> None:
        raise RuntimeError("half \ud83d")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_reporting(fail, ["run", "caf\udce9"]) == 1
    (log,) = tmp_path.glob("qe-edge-*.log")
    assert "caf\\udce9" in log.read_text(encoding="utf-8")
    assert f"The full traceback is in '{log}'" in capsys.readouterr().err


def test_a_common_notice_is_one_line(cli: Run, tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("I;16", (8, 8), 9).save(tmp_path / name)
    outcome = cli("quantize", "demo", "-o", tmp_path / "out", "--calibration", tmp_path, "--method", "rtn")
    assert outcome.code == 0, outcome.err
    assert outcome.err.count("Note: ") == 1
    assert issubclass(CommonNotice, UserWarning)
    assert "each by its own range" in outcome.err


def test_several_pictures_are_asked_about(cli: Run, tmp_path: Path, exported: Exported) -> None:
    for name in ("red", "blue"):
        Image.new("RGB", (56, 56), name).save(tmp_path / f"{name}.png")
    red, blue = ("--image", tmp_path / "red.png"), ("--image", tmp_path / "blue.png")
    one = cli("run", exported.onnx, *red, "--prompt", "what color?")
    two = cli("run", exported.onnx, *red, *blue, "--prompt", "what color?")
    assert one.code == two.code == 0, two.err
    assert "picture " in one.err
    assert "pictures " in two.err
    assert prompt_tokens(two.err) == prompt_tokens(one.err) + 18  # start, 16 features, end
    missing = cli("run", exported.onnx, *red, "--image", tmp_path / "gone.png", "--prompt", "?")
    assert_two_lines(missing, "gone.png'", "Check the path")


def test_an_engine_puts_features_where_pytorch_does(exported: Exported, held_out: list[Sample]) -> None:
    first, second, third = (sample.pictures[0] for sample in held_out[:3])
    earlier = (Turn("user", "what is it?", (0,)), Turn("assistant", "a circle"))
    samples = [Sample([first, second], "which?"), Sample([third, first], "and this one?", earlier=earlier, marks=(4,))]
    engine = VisionLanguageEngine.load(exported.onnx)
    loaded = load_quantized(exported.checkpoint)
    loaded.model.float()
    encoded = engine.encode(samples)
    wanted = TorchSubject(loaded).logits(encoded)
    valid = encoded.attention_mask.astype(bool)
    found = engine.logits(encoded)
    assert np.abs(found[valid] - wanted[valid]).max() < 0.02 * np.abs(wanted[valid]).max()


def prompt_tokens(text: str) -> int:
    found = re.search(r"prompt of (\d+) tokens", text)
    assert found
    return int(found.group(1))
