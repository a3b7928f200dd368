"""The device kit's file in the report's page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qe_edge.report import load_device_check, render_page, write_report
from qe_edge.report.device_check import DeviceCheck
from qe_edge.system.errors import ArtifactError
from qe_edge.validate.schema import Report
from tests.cli.running import assert_two_lines
from tests.report.test_page import HOSTILE, Elements

TIMES = "\N{MULTIPLICATION SIGN}"
FILE = Path(__file__).parent / "device.json"


def words(report: Report, device: DeviceCheck | None) -> str:
    return " ".join(Elements(render_page(report, device)).text.split())


def test_the_page_shows_the_fastest_tactic_beside_its_peers(report: Report) -> None:
    device = load_device_check(FILE)
    first, second = device.speeds()
    assert (first.ours.microseconds, first.times("cuBLAS FP16"), first.times("TensorRT INT4 g128")) == (20.0, 2.3, 1.25)
    assert (second.ours.tokens, second.ours.block_rows, second.peers) == (1024, 128, {})
    (step,) = device.step_speeds()
    assert step.times("cuBLAS FP16") == pytest.approx(1.4)
    text = words(report, device)
    for expected in (
        "A GPU that does not exist, compute capability 8.7, CUDA 12.6, aarch64", "1 of 2 results agree",
        "Wrong: w4a16 at 150 tokens", f"2.3 {TIMES}", f"1.2 {TIMES}", f"1.4 {TIMES}", "no engine was built",
        "Failed: a launch failed", "commit abc, driver 540.4, torch 2.11",
    ):  # fmt: skip
        assert expected in text, expected


def test_without_a_check_the_page_is_as_before(report: Report) -> None:
    assert "The plugin on a device" not in words(report, None)
    assert render_page(report) == render_page(report, None)


def test_what_the_file_says_stays_text(report: Report) -> None:
    device = load_device_check(FILE).model_copy(update={"device": HOSTILE, "skipped": {HOSTILE: HOSTILE}})
    tags = {tag for tag, _ in Elements(render_page(report, device)).tags}
    assert "script" not in tags
    assert "img" in tags
    assert HOSTILE in Elements(render_page(report, device)).text


def test_a_value_that_is_not_finite_is_shown(report: Report, tmp_path: Path) -> None:
    data = json.loads(FILE.read_text(encoding="utf-8"))
    data["numerics"][1]["error"] = float("inf")
    (tmp_path / "device.json").write_text(json.dumps(data), encoding="utf-8")
    assert "the largest relative error is inf" in words(report, load_device_check(tmp_path / "device.json"))


@pytest.mark.parametrize("text", ["", "[]", '{"kind": "qe_edge.report"}', '{"kind": "qe_edge.device_check"}'])
def test_a_file_that_is_no_check(tmp_path: Path, text: str) -> None:
    (tmp_path / "device.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match="is no device check") as caught:
        load_device_check(tmp_path / "device.json")
    assert "device_check.sh" in caught.value.remedy
    with pytest.raises(ArtifactError, match="There is no device check"):
        load_device_check(tmp_path / "gone.json")


def test_the_command(report: Report, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from qe_edge.cli import main
    from tests.cli.running import Outcome

    write_report(report, tmp_path / "report.json", tmp_path / "report.html")
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "report.json"), "-o", str(page), "--device-json", str(FILE)]) == 0
    assert "The plugin on a device" in page.read_text(encoding="utf-8")
    capfd.readouterr()
    code = main(["report", str(tmp_path / "report.json"), "-o", str(tmp_path / "b.html"), "--device-json", "no.json"])
    assert_two_lines(Outcome(code, *capfd.readouterr()), "no device check 'no.json'", "device.json")
    assert not (tmp_path / "b.html").exists()
