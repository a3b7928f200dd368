"""The paper's tables on stand-in tasks, through lmms-eval where this environment has it, else through a stand-in."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks import paper_tables
from benchmarks.paper_tables import TASKS, Environment, Task, choose_tasks, make_row, score_of
from qe_edge.calibration.sources import load_evaluation
from qe_edge.models.loading import load_model
from qe_edge.models.quantized import save_quantized
from qe_edge.quantization.quantizer import quantize
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import ArtifactError, ResourceError, UnknownNameError
from qe_edge.validate.answers import answer_all, is_right
from qe_edge.validate.subjects import TorchSubject, in_float32

QUESTIONS = 6
SHAPES = Task("Shapes", "standin_shapes", "exact_match")
REAL = importlib.util.find_spec("lmms_eval") is not None

FAKE = {  # of lmms-eval, what the adapter touches: base class, task manager, evaluator
    "__init__.py": "",
    "api/__init__.py": "",
    "api/model.py": """
class lmms:
    def __init__(self):
        self.task_dict = {}
""",
    "tasks/__init__.py": """
class TaskManager:
    def __init__(self, verbosity, include_path):
        self.folder = include_path
""",
    "evaluator.py": """
import importlib.util, json, pathlib, types

def simple_evaluate(model, tasks, task_manager, limit, **options):
    (task,) = tasks
    folder = pathlib.Path(task_manager.folder)
    docs = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()][:limit]
    spec = importlib.util.spec_from_file_location("visuals", folder / "visuals.py")
    visuals = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(visuals)
    model.task_dict[task] = {"test": docs}
    request = lambda *args: types.SimpleNamespace(args=args)
    settings = {"max_new_tokens": 8}
    asked = [request(doc["question"], settings, visuals.pictures, i, task, "test") for i, doc in enumerate(docs)]
    right = [a.lower() == doc["answer"] for a, doc in zip(model.generate_until(asked), docs, strict=True)]
    numbers = {"exact_match,none": sum(right) / len(right)}
    return {"results": {task: {"alias": task, **numbers}}, "n-samples": {task: {"effective": len(docs)}}}
""",
}
SHAPES_YAML = """
task: standin_shapes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/test.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function visuals.pictures
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 8
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
metadata:
  - version: 0.0
"""
# two halves of a picture: joined side by side they are the picture that the demo knows
VISUALS = """
from PIL import Image

def pictures(doc):
    picture = Image.open(doc["image"]).convert("RGB")
    middle = picture.width // 2
    return [picture.crop((0, 0, middle, picture.height)), picture.crop((middle, 0, picture.width, picture.height))]
"""


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of the demo as a task."""
    folder = tmp_path_factory.mktemp("tasks")
    docs = [
        {"image": str(sample.image), "question": sample.question, "answer": sample.answer}
        for sample in load_evaluation("demo")[:QUESTIONS]
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    (folder / "visuals.py").write_text(VISUALS, encoding="utf-8")
    (folder / "shapes.yaml").write_text(SHAPES_YAML.format(folder=folder), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def environment(include: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """This interpreter; where it lacks lmms-eval, with the stand-in on its path."""
    if REAL:
        return Environment(Path(sys.executable), include, device="cpu")
    folder = tmp_path_factory.mktemp("environment")
    for name, text in FAKE.items():
        path = folder / "lmms_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return Environment(python, include, device="cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "rtn"
    recipe = make_recipe(method="rtn", calibration={"samples": 2})
    save_quantized(*quantize("demo", recipe), folder)
    return folder


@pytest.mark.slow
def test_the_table(
    environment: Environment,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = ["--python", environment.python, "-o", tmp_path, "--include", environment.include]
    task = f"{SHAPES.title}={SHAPES.name}:{SHAPES.metric}"
    arguments = ["demo", checkpoint, *paths, "--tasks", task, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", *map(str, arguments)])
    assert paper_tables.main() == 0
    heading, first, second, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["model", "stored", "read", "Shapes", "mean"]
    assert [row.split()[0] for row in (first, second)] == ["demo", "rtn"]
    original, quantized = json.loads(line)["rows"]
    assert first.split()[3] == first.split()[4] == f"{100 * original['Shapes']:.1f}"
    assert original["stored"] == original["read"] == 16
    assert 4 < quantized["stored"] < 4.5
    samples = load_evaluation("demo")[:QUESTIONS]
    loaded = in_float32(load_model("demo"))
    answers = answer_all(TorchSubject(loaded), loaded, samples, 8, lambda _: None)
    right = [is_right(answer, sample.answer or "") for answer, sample in zip(answers, samples, strict=True)]
    assert original["Shapes"] == pytest.approx(sum(right) / len(right))
    # nothing is evaluated twice, until the model is newer or the limit another
    broken = Environment(Path("/nowhere"), environment.include)
    assert make_row("demo", [SHAPES], broken, tmp_path).scores == {"Shapes": original["Shapes"]}
    with pytest.raises(OSError, match="nowhere"):
        make_row("demo", [SHAPES], Environment(Path("/nowhere"), limit=1), tmp_path)
    weights = checkpoint / "model.safetensors"
    os.utime(weights, (weights.stat().st_mtime + 1000,) * 2)
    with pytest.raises(OSError, match="nowhere"):
        make_row(str(checkpoint), [SHAPES], broken, tmp_path)


def test_a_failing_task_says_where_its_log_is(environment: Environment, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"Shapes on '/nowhere' failed: There is no model folder.*\.log"):
        make_row("/nowhere", [SHAPES], environment, tmp_path)
    (log,) = tmp_path.rglob("*.log")
    assert "no model folder" in log.read_text(encoding="utf-8")


def test_environments_that_lack_something(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no Python interpreter"):
        Environment(tmp_path / "python").check()
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n', encoding="utf-8")
    bare.chmod(0o755)
    with pytest.raises(ResourceError, match="cannot import qe_edge: ModuleNotFoundError"):
        Environment(bare).check()


def test_tasks() -> None:
    assert [task.title for task in choose_tasks(["MMLU", "A=b:c,d"])] == ["MMLU", "A"]
    assert choose_tasks(["A=b:c"]) == [Task("A", "b", "c")]
    assert len(TASKS) == 12
    with pytest.raises(UnknownNameError, match="DocVQA"):
        choose_tasks(["DocVA"])


def test_scores() -> None:
    found = {
        "results": {"ai2d": {"alias": "ai2d", "exact_match,flexible-extract": 0.5, "exact_match_stderr,none": 1.0}}
    }
    assert score_of(found, TASKS["AI2D"]) == 0.5
    with pytest.raises(ArtifactError, match="only for exact_match"):
        score_of(found, Task("AI2D", "ai2d", "anls"))
    subjects = {"a": {"exact_match,none": 1.0}, "b": {"exact_match,none": 0.0}, "mmlu_generative": {"acc,none": "N/A"}}
    group = {"results": subjects, "samples": {"a": {"effective": 3}, "b": {"effective": 1}}}
    assert score_of(group, TASKS["MMLU"]) == 0.75
    with pytest.raises(ArtifactError, match="only for nothing"):
        score_of(found, TASKS["MMMU"])
