"""What `deploy` does again and what it keeps; the stages are stand-ins that write a line each."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

import pytest

from qe_edge.cli import deploy_work
from qe_edge.deploy import order, pipeline
from qe_edge.deploy.layout import LEDGER, is_deployment
from qe_edge.deploy.pipeline import deploy
from qe_edge.export import plugin_check
from qe_edge.models.fingerprints import model_parts
from qe_edge.quantization import job
from qe_edge.recipes.recipe import make_recipe
from qe_edge.runtime.limits import EngineLimits
from qe_edge.system.errors import ArtifactError, InputError
from tests.cli.running import Run

RECIPE = make_recipe(method="rtn", calibration={"samples": 2})


class Stages:
    """Stand-ins for the stages; notes which ran, and fails in one of them if told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.libraries: dict[str, Path | None] = {}
        self.limits: dict[str, object] = {}
        self.fail_in = ""
        for name, stand_in in {
            "quantize_to_folder": lambda _job, out, **_k: self._folder("quantize", out),
            "export_model": lambda _c, out, **_k: self._folder("export", out),
            "build_engines": self._build,
            "read_manifest": lambda _folder: "manifest",
            "tell_limits": lambda *words: words[-1](f"limits of {words[1]}"),
            "with_limits": lambda manifest, wanted: f"{manifest}, {wanted.batch}",
            "validate": lambda *_a, **_k: "report",
            "write_report": self._report,
            "load_report": lambda path: path.read_text(),
        }.items():
            monkeypatch.setattr(pipeline, name, stand_in)
        monkeypatch.setattr(order, "check_targets", list)

    def _folder(self, stage: str, out: Path) -> None:
        if stage == self.fail_in:
            raise KeyboardInterrupt
        out.mkdir(parents=True, exist_ok=True)
        self.ran.append(stage)

    def _build(self, _onnx: Path, out: Path, target: str, plugin_library: Path | None, **others: object) -> None:
        self.libraries[target] = plugin_library
        self.limits[target] = others["limits"]
        self._folder(target, out)

    def _report(self, report: str, path: Path, page: Path) -> None:
        path.write_text(report)
        page.write_text(report)
        self.ran.append("report")

    def take(self) -> list[str]:
        """Which stages ran since the last call."""
        ran, self.ran = self.ran, []
        return ran


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    return Stages(monkeypatch)


def test_everything_runs_once_and_is_kept_on_resume(stages: Stages, tmp_path: Path) -> None:
    lines: list[str] = []
    deploy("demo", tmp_path, RECIPE, ["cpu", "rtx"])
    assert stages.take() == ["quantize", "export", "cpu", "rtx", "report"]
    assert deploy("demo", tmp_path, RECIPE, ["cpu", "rtx"], resume=True, announce=lines.append) == "report"
    assert stages.take() == []
    assert len(lines) == 5
    assert all(line.endswith("complete already") for line in lines)


def test_samples_are_drawn_once_and_the_plan_is_made_once(
    stages: Stages, tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(module: ModuleType, name: str) -> None:
        original = getattr(module, name)

        def count(*words: object, **options: object) -> object:
            calls.append(name)
            return original(*words, **options)

        monkeypatch.setattr(module, name, count)

    counted(job, "load_samples")
    counted(job, "model_parts")
    counted(order, "load_evaluation")
    counted(order, "make_plan")
    monkeypatch.setattr(deploy_work, "print_summary", lambda _report: None)
    assert cli("deploy", "demo", "-o", tmp_path / "out", "--method", "rtn", "--samples", "2").code == 0
    assert stages.take() == ["quantize", "export", "cpu", "report"]
    assert sorted(calls) == ["load_evaluation", "load_samples", "make_plan", "model_parts"]


def test_without_resume_everything_is_done_again(stages: Stages, tmp_path: Path) -> None:
    deploy("demo", tmp_path, RECIPE, ["rtx"])
    (tmp_path / "notes.txt").write_text("mine")
    stages.take()
    deploy("demo", tmp_path, RECIPE, ["cpu"])
    assert stages.take() == ["quantize", "export", "cpu", "report"]
    assert not (tmp_path / "engines" / "rtx").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_stopped_deployment_continues_in_the_stage_that_it_reached(stages: Stages, tmp_path: Path) -> None:
    stages.fail_in = "cpu"
    with pytest.raises(KeyboardInterrupt):
        deploy("demo", tmp_path, RECIPE)
    assert stages.take() == ["quantize", "export"]
    stages.fail_in = ""
    deploy("demo", tmp_path, RECIPE, resume=True)
    assert stages.take() == ["cpu", "report"]


def test_a_missing_output_is_made_again(stages: Stages, tmp_path: Path) -> None:
    deploy("demo", tmp_path, RECIPE)
    stages.take()
    shutil.rmtree(tmp_path / "onnx")
    deploy("demo", tmp_path, RECIPE, resume=True)
    assert stages.take() == ["export"]


def test_a_further_target_is_built_beside_the_first(stages: Stages, tmp_path: Path) -> None:
    deploy("demo", tmp_path, RECIPE, ["cpu"])
    stages.take()
    deploy("demo", tmp_path, RECIPE, ["cpu", "rtx"], resume=True)
    assert stages.take() == ["rtx", "report"]


def test_only_targets_that_take_the_plugin_are_built_with_it(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_check, "choose_plugin", lambda _targets, library: library)
    asked: list[tuple[list[str], int]] = []
    monkeypatch.setattr(
        plugin_check,
        "check_forms",
        lambda targets, _library, forms: asked.append(([target.name for target in targets], len(forms))),
    )
    library, out = tmp_path / "libqe_plugin.so", tmp_path / "out"
    library.write_text("one")
    deploy("demo", out, RECIPE, ["cpu", "rtx"], plugin_library=library)
    assert stages.libraries == {"cpu": None, "rtx": library}
    assert [targets for targets, _ in asked] == [["rtx"]]
    assert asked[0][1] > 10  # the layers of the demo
    stages.take()
    deploy("demo", out, RECIPE, ["cpu", "rtx"], plugin_library=library, resume=True)
    assert stages.take() == []
    library.write_text("another")
    deploy("demo", out, RECIPE, ["cpu", "rtx"], plugin_library=library, resume=True)
    assert stages.take() == ["rtx", "report"]
    deploy("demo", out, RECIPE, ["cpu", "rtx"], resume=True)
    assert stages.take() == ["rtx", "report"]
    assert stages.libraries == {"cpu": None, "rtx": None}


def test_limits_are_for_the_engines_of_gpus(stages: Stages, tmp_path: Path) -> None:
    lines: list[str] = []
    deploy("demo", tmp_path, RECIPE, ["cpu", "rtx"], limits=EngineLimits(batch=2), announce=lines.append)
    assert stages.limits == {"cpu": None, "rtx": EngineLimits(batch=2)}
    assert [line for line in lines if line.startswith("limits")] == ["limits of manifest, 2"]
    stages.take()
    deploy("demo", tmp_path, RECIPE, ["cpu", "rtx"], limits=EngineLimits(batch=2), resume=True)
    assert stages.take() == []
    deploy("demo", tmp_path, RECIPE, ["cpu", "rtx"], limits=EngineLimits(batch=3), resume=True)
    assert stages.take() == ["rtx", "report"]
    deploy("demo", tmp_path, RECIPE, ["cpu", "rtx"], limits=EngineLimits(), resume=True)
    assert stages.take() == ["rtx", "report"]
    deploy("demo", tmp_path, RECIPE, ["cpu", "rtx"], resume=True)
    assert stages.take() == []


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (EngineLimits(tiles=3), "A 'qwen2_vl' model has no tiles"),
        (EngineLimits(context=1 << 20), "1048576 are asked for"),
        (EngineLimits(prompt=60, context=40), "does not fit into a context of 40"),
    ],
)
def test_limits_that_the_model_cannot_have_are_found_first(
    stages: Stages, tmp_path: Path, limits: EngineLimits, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        deploy("demo", tmp_path / "out", RECIPE, ["rtx"], limits=limits)
    assert stages.take() == []
    assert list(tmp_path.iterdir()) == []


def test_model_parts_follows_every_file(model: Path) -> None:
    before = model_parts(str(model))
    assert before == model_parts("demo")
    tokenizer = model / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert model_parts(str(model)) != before


@pytest.mark.parametrize("sign", ["deploy.json", "checkpoint.work/run.json", "checkpoint/recipe.json"])
def test_a_deployment_is_known_however_far_it_came(tmp_path: Path, sign: str) -> None:
    assert not is_deployment(tmp_path)
    (tmp_path / sign).parent.mkdir(exist_ok=True)
    (tmp_path / sign).write_text("not json")
    assert is_deployment(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "\ufeff{,}"])
def test_a_damaged_ledger_is_not_passed_over(stages: Stages, tmp_path: Path, text: str) -> None:
    (tmp_path / LEDGER).write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"deploy\.json' (is not valid JSON|holds no JSON table)") as caught:
        deploy("demo", tmp_path, RECIPE, resume=True)
    assert caught.value.remedy == "Delete it; every stage is then made again."
    assert stages.take() == []
    assert [path.name for path in tmp_path.iterdir()] == [LEDGER]
    deploy("demo", tmp_path, RECIPE)


def test_a_folder_of_others_is_left_alone(stages: Stages, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    for resume in (False, True):
        with pytest.raises(InputError, match="did not write"):
            deploy("demo", tmp_path, RECIPE, resume=resume)
    assert stages.take() == []
    assert (tmp_path / "onnx").is_dir()


def test_another_recipe_replaces_everything_that_came_of_the_first(stages: Stages, tmp_path: Path) -> None:
    deploy("demo", tmp_path, RECIPE, ["cpu", "rtx"])
    stages.take()
    other = make_recipe(method="rtn", scheme="w4a16", calibration={"samples": 2})
    with pytest.raises(ArtifactError, match="recipe key 'scheme' was 'w4a8' and is 'w4a16'") as refused:
        deploy("demo", tmp_path, other, resume=True)
    assert "--overwrite instead" in refused.value.remedy
    assert stages.take() == []
    deploy("demo", tmp_path, other)
    assert stages.take() == ["quantize", "export", "cpu", "report"]
    assert not (tmp_path / "engines" / "rtx").exists()


def test_a_failure_in_quantizing_keeps_the_earlier_results(stages: Stages, tmp_path: Path) -> None:
    deploy("demo", tmp_path, RECIPE)
    stages.take()
    stages.fail_in = "quantize"
    with pytest.raises(KeyboardInterrupt):
        deploy("demo", tmp_path, RECIPE)
    assert (tmp_path / "report.json").is_file()
    assert (tmp_path / "engines" / "cpu").is_dir()


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_the_first_command_of_the_readme(cli: Run, tmp_path: Path) -> None:
    """`qe-edge deploy demo -o out`, with fewer questions and a quick recipe; CI runs it as it stands."""
    out = tmp_path / "out"
    words = ["deploy", "demo", "-o", out, "--method", "rtn", "--samples", "1", "--limit", "2"]
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err
    assert {path.name for path in out.iterdir()} == {
        "checkpoint", "onnx", "engines", "report.json", "report.html", LEDGER,
    }  # fmt: skip
    assert "bits per weight stored" in outcome.out
    assert "Traceback" not in outcome.err
    assert "Warning" not in outcome.err
    refused = cli(*words)
    assert refused.code == 2
    assert "--resume to continue" in refused.err
    resumed = cli(*words, "--resume")
    assert resumed.code == 0, resumed.err
    assert resumed.err.count("complete already") == 4
