"""A dry run does nothing, and what it predicts comes true."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qe_edge.budget.accounting import layer_counts
from qe_edge.calibration.sources import load_samples
from qe_edge.cli.outputs import folder_bytes
from qe_edge.demo import model_path
from qe_edge.layers.linear import quantized_linears
from qe_edge.models.family import TEXT, Sample
from qe_edge.quantization.folder import quantize_to_folder
from qe_edge.quantization.job import make_job
from qe_edge.quantization.plan import collapse, make_plan
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import ResourceError
from tests.cli.running import Run, assert_two_lines
from tests.small_models import write_small_llama


@pytest.mark.parametrize("method", ["rtn", "qe"])
@pytest.mark.parametrize("scheme", ["w4a8", "w3a16"])
def test_predicted_bits_are_those_of_the_quantized_layers(method: str, scheme: str) -> None:
    # two experts: calibration may leave experts out of a prediction, but a single one is none
    options = {"tokens": 128, "em_steps": 0, "experts": 2} if method == "qe" else {}
    recipe = make_recipe(method=method, scheme=scheme, modules=["merger"], options=options, calibration={"samples": 2})
    plan = make_plan(str(model_path()), recipe, load_samples("demo", 2))
    loaded, _ = quantize("demo", recipe)
    counts = layer_counts(quantized_linears(loaded.model))
    assert list(counts) == [layer.name for layer in plan.layers]
    for layer in plan.layers:
        found = counts[layer.name]
        assert layer.bits.weights == found.weights
        assert layer.bits.codes == found.codes
        assert layer.bits.adapters == found.adapters
        assert layer.bits.router == found.router
        # whether a channel factor is stored depends on the calibration data: 16 bits for every input channel
        extra = 16 * layer.in_features if method == "qe" else 0
        assert 0 <= found.scales - layer.bits.scales <= extra
        assert 0 <= found.read - layer.bits.read <= extra


def test_predicted_size_of_the_checkpoint(tmp_path: Path) -> None:
    recipe = make_recipe(method="rtn", modules=["language", "visual", "merger"], calibration={"samples": 1})
    plan = make_plan(str(model_path()), recipe, load_samples("demo", 1))
    quantize_to_folder(make_job("demo", recipe), tmp_path / "checkpoint")
    assert folder_bytes(tmp_path / "checkpoint") == pytest.approx(plan.checkpoint_bytes, rel=0.1)
    assert plan.disk_bytes > plan.checkpoint_bytes
    assert sum(layer.bits.weights for layer in plan.layers) == plan.total.weights


def test_the_matrix_before_a_rotated_models_head_is_counted(tmp_path: Path) -> None:
    plans, found = {}, {}
    for method in ("rtn", "quarot"):
        recipe = make_recipe(method=method, options={"rounding": "nearest"} if method == "quarot" else {})
        plans[method] = make_plan(str(model_path()), recipe, load_samples("demo", 1))
        quantize_to_folder(make_job("demo", recipe), tmp_path / method)
        found[method] = folder_bytes(tmp_path / method)
    more = plans["quarot"].checkpoint_bytes - plans["rtn"].checkpoint_bytes
    assert more > 100_000
    assert more == pytest.approx(found["quarot"] - found["rtn"], rel=0.02)
    assert plans["quarot"].memory_bytes - plans["rtn"].memory_bytes > 2 * more  # float32 outside the blocks


def test_layers_of_all_blocks_are_one_row() -> None:
    plan = make_plan(str(model_path()), make_recipe(method="rtn"), load_samples("demo", 1))
    rows = collapse(plan.layers)
    assert len(rows) == 7
    assert {count for _, _, count in rows} == {4}
    assert rows[0][0] == "model.language_model.layers.*.self_attn.q_proj"


def test_a_dry_run_shows_everything_and_writes_nothing(cli: Run, tmp_path: Path) -> None:
    outcome = cli("quantize", "demo", "-o", tmp_path / "checkpoint", "--dry-run", "--modules", "language,merger")
    assert outcome.code == 0, outcome.err
    for part in (
        "scheme: w4a8", "layers.*.self_attn.q_proj", "model.visual.merger.mlp.0", "768 x 256", "8 + 8 x 8",
        "Stored bits", "Read bits", "Memory:", "Disk:", "Time:        about ",
    ):  # fmt: skip
        assert part in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_may_name_a_folder_in_use(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    assert cli("quantize", "demo", "-o", tmp_path, "--dry-run", "--samples", "1").code == 0


def test_a_dry_run_says_why_it_does_not_know_the_time(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("quantize", "demo", "-o", tmp_path / "checkpoint", "--dry-run", "--samples", "1")
    assert "Time:        not known: 'dlqat' trains the whole model\n" in cli(*given, "--method", "dlqat").out

    def refuse(_needed: int) -> None:
        raise ResourceError("Quantizing needs 9 GiB and 1 GiB is free.", "Use a larger machine.")

    monkeypatch.setattr("qe_edge.cli.quantize_work.check_memory", refuse)
    outcome = cli(*given)
    assert outcome.code == 0
    assert "Time:        not measured: Quantizing needs 9 GiB and 1 GiB is free.\n" in outcome.out


MEASURED = """
import sys
from qe_edge.cli import main
code = main()
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("method", "sizes"),
    [
        ("rtn", {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}),
        ("gptq", {"hidden_size": 256, "intermediate_size": 10240, "num_hidden_layers": 1}),
    ],
)
def test_predicted_memory_is_that_of_a_run(method: str, sizes: dict[str, int], tmp_path: Path) -> None:
    """The first model's blocks are 400 MB together, and its run holds one. Solving takes two thirds of the second's."""
    model = write_small_llama(tmp_path / "model", **sizes)
    data = tmp_path / "text.jsonl"
    data.write_text('{"text": "A few words."}\n', encoding="utf-8")
    words = [str(model), "--method", method, "--calibration", str(data), "-o", str(tmp_path / "checkpoint")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "quantize", *words], capture_output=True, text=True, check=True
    )
    recipe = make_recipe(method=method, calibration={"source": str(data)})
    plan = make_plan(str(model), recipe, load_samples(str(data)))
    assert 1024 * int(done.stdout.splitlines()[-1]) == pytest.approx(plan.memory_bytes, rel=0.2)


def test_one_long_text_counts_with_its_whole_batch(cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_small_llama(tmp_path / "model", max_position_embeddings=4096)
    source, recipe = str(model), make_recipe(method="rtn", scheme="w4a16")
    short = [Sample(None, "a red circle", kind=TEXT) for _ in range(16)]
    long = Sample(None, "a red circle and " * 600, kind=TEXT)
    usual, more = (make_plan(source, recipe, samples).memory_bytes for samples in (short, [*short[:-1], long]))
    assert more - usual > 8 * 5 * 2000**2  # the mask of eight rows as long as that one
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "a red circle"}\n', encoding="utf-8")
    monkeypatch.setattr("qe_edge.quantization.plan.peak_memory", lambda *_arguments: 2**50)
    outcome = cli("quantize", "model", "-o", "out", "--method", "rtn", "--calibration", "texts.jsonl")
    assert_two_lines(outcome, "Quantizing needs about 1048576.0 GiB of memory", "fewer --samples")
    assert not (tmp_path / "out").exists()
