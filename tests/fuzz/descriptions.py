"""Targets: reports, ledgers of deployments, recipes, samples and requests to a server."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from qe_edge.calibration.sources import hash_samples, load_evaluation, load_samples
from qe_edge.cli.recipes import read_recipe
from qe_edge.demo import calibration_path
from qe_edge.deploy.layout import Layout, is_deployment
from qe_edge.deploy.ledger import Ledger
from qe_edge.models.images import open_image
from qe_edge.models.messages import plain_text, read_messages, read_turns
from qe_edge.models.videos import open_video
from qe_edge.recipes.recipe import make_recipe
from qe_edge.runtime.answer_options import answer_options
from qe_edge.runtime.generation import GenerationSettings
from qe_edge.server.errors import RequestError
from qe_edge.server.pictures import bounded, check_videos, picture_source
from qe_edge.server.schema import conversation, read_request
from qe_edge.server.settings import ServerSettings
from qe_edge.system.errors import InputError, QEError
from qe_edge.system.json_files import read_json_table
from tests.fuzz.target import Target, digest
from tests.report.conftest import make_report

DEVICE = Path(__file__).parents[1] / "report" / "device.json"


def _prepare_report(folder: Path, _sound: Mapping[str, Path]) -> None:
    (folder / "report.json").write_text(make_report().model_dump_json(), encoding="utf-8")
    shutil.copy(DEVICE, folder / "device.json")


def _read_report(folder: Path) -> str:
    from qe_edge.report import load_device_check, load_report, write_page

    write_page(load_report(folder / "report.json"), folder / "page.html", load_device_check(folder / "device.json"))
    return ""


def _prepare_deployment(folder: Path, _sound: Mapping[str, Path]) -> None:
    (folder / "report.json").write_text("{}", encoding="utf-8")
    ledger = Ledger(folder / "deploy.json", {"version": "1"})
    for stage in ("checkpoint", "onnx", "engines/cpu"):
        ledger.finish(stage, "0" * 64, [folder / "report.json"])


def _read_deployment(folder: Path) -> str:
    layout = Layout(folder)
    is_deployment(folder)
    ledger = Ledger.read(layout.ledger, resume=True)
    begun = [ledger.problem(name, "0" * 64, [layout.report]) for name in ("checkpoint", "onnx", "report")]
    ledger.listed(layout.onnx)
    ledger.finish("onnx", "3" * 64, [layout.report])
    return digest(begun)


def _prepare_recipe(folder: Path, _sound: Mapping[str, Path]) -> None:
    import yaml

    recipe = make_recipe(scheme="w3a16", budget={"bits": 3.5}, options={"experts": 2}).resolved()
    values = recipe.model_dump(mode="json", exclude_none=True)
    (folder / "recipe.json").write_text(json.dumps(values), encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    settings = {"settings": ["experts=4", "tokens=128", "rotate=false"], "bits": "4.5"}
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")


def _read_recipe(folder: Path) -> str:
    for name in ("recipe.json", "recipe.yaml"):
        read_recipe(recipe_file=folder / name).resolved().model_dump_json()
    try:  # stands for a command line, which has words and no JSON
        words = read_json_table(folder / "settings.json")["settings"]
    except (QEError, KeyError):
        words = []
    settings = (
        [word for word in words if isinstance(word, str) and len(word) < 100_000] if isinstance(words, list) else []
    )
    read_recipe(settings=settings).resolved().model_dump_json()
    return ""


def _prepare_samples(folder: Path, _sound: Mapping[str, Path]) -> None:
    shutil.copytree(calibration_path().parent / "images" / "calibration", folder / "images" / "calibration")
    for path in sorted((folder / "images" / "calibration").iterdir())[4:]:
        path.unlink()
    lines = calibration_path().read_text(encoding="utf-8").splitlines()[:4]
    lines += ['{"text": "running text"}', '{"question": "is it?", "answer": "no"}']
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _read_samples(folder: Path) -> str:
    hash_samples(load_samples(str(folder / "samples.jsonl")))
    hash_samples(load_samples(str(folder / "images")))
    with suppress(QEError):  # not every line has an answer
        load_evaluation(str(folder / "samples.jsonl"))
    return ""


def _prepare_request(folder: Path, _sound: Mapping[str, Path]) -> None:
    png = sorted((calibration_path().parent / "images" / "calibration").iterdir())[0].read_bytes()
    url = {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": url}]
    said = (("system", "be short"), ("user", parts), ("assistant", "a circle"), ("user", "and its color?"))
    messages = [{"role": role, "content": content} for role, content in said]
    options = {"max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["."], "n": 1, "stream": True}
    (folder / "request.json").write_text(json.dumps({"model": "m", "messages": messages} | options), encoding="utf-8")


def _read_request(folder: Path) -> str:
    """As the server does, up to the model."""
    settings, file = ServerSettings("m", picture_folder=folder), folder / "request.json"
    if not file.is_file():  # it stands for a body, which is there
        raise InputError("There is no request.", "Send one.")
    try:
        asked = read_request(file.read_bytes())
    except RequestError as error:
        raise InputError(error.message, "Correct the request.") from error
    messages = conversation(asked)
    read_turns(messages, "messages", plain_text)
    sample = read_messages(messages, open_source=bounded(picture_source(settings), settings.max_pixels))
    check_videos(sample.videos, settings.max_pixels)
    answer_options(GenerationSettings(eos_token_ids=(0,), pad_token_id=0), asked.options)
    for picture in sample.pictures:
        open_image(picture)
    for video in sample.videos:
        open_video(video).read([0])
    return ""


TARGETS = (
    Target("request", _prepare_request, _read_request, ("request.json",)),
    Target("report", _prepare_report, _read_report, ("*.json",)),
    Target("deployment", _prepare_deployment, _read_deployment, ("deploy.json",)),
    Target("recipe", _prepare_recipe, _read_recipe, ("recipe.*", "settings.json")),
    Target("samples", _prepare_samples, _read_samples, ("samples.jsonl", "images/calibration/*.png")),
)
