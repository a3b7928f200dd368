"""What a line may hold, and public captions read from a copy in the hub's layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qe_edge.calibration import captions
from qe_edge.calibration.captions import CAPTION_PROMPT, SHAREGPT4V_FILE
from qe_edge.calibration.sources import hash_samples, load_evaluation, load_samples
from qe_edge.models.family import TEXT, Sample
from qe_edge.models.images import open_image
from qe_edge.recipes.recipe import make_recipe
from qe_edge.system.errors import CalibrationError, CommonNotice

CAPTIONED = 12


def save_picture(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)


def write_lines(path: Path, *entries: object) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return str(path)


def test_a_line_may_hold_text_or_a_picture_alone(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", 1)
    source = write_lines(
        tmp_path / "data.jsonl", {"text": "Once upon a time."}, {"image": "a.png"}, {"question": "why?", "answer": "so"}
    )
    text, picture, question = load_samples(source)
    assert text == Sample(None, "Once upon a time.", kind=TEXT)
    assert picture == Sample((tmp_path / "a.png").resolve(), CAPTION_PROMPT)
    assert question == Sample(None, "why?", "so")


@pytest.mark.parametrize(
    "entry",
    [{"text": ""}, {"text": 3}, {"text": "a", "image": "b.png"}, {"answer": "a"}, {"question": None}, ["a"], {}],
)
def test_other_lines_are_named(tmp_path: Path, entry: object) -> None:
    with pytest.raises(CalibrationError, match=r"Line 2 .*"):
        load_samples(write_lines(tmp_path / "data.jsonl", {"text": "fine"}, entry))


def test_text_is_no_evaluation(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="without an answer"):
        load_evaluation(write_lines(tmp_path / "data.jsonl", {"text": "Once upon a time."}))


def test_the_hash_tells_text_from_a_question() -> None:
    assert hash_samples([Sample(None, "a", kind=TEXT)]) != hash_samples([Sample(None, "a")])


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package `datasets` with a cache of its own; it is in the extra `eval` only."""
    config = pytest.importorskip("datasets.config")
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def sharegpt4v(tmp_path: Path, cache: None) -> Path:
    """Captions in the released layout, some of pictures that are not COCO's."""
    rows = []
    for number in range(CAPTIONED):
        name = f"coco/train2017/{number:012d}.jpg"
        save_picture(tmp_path / name, number)
        turns = [
            {"from": "human", "value": "<image>\nWhat do you see?"},
            {"from": "gpt", "value": f"Caption {number}."},
            {"from": "human", "value": "And further?"},
            {"from": "gpt", "value": "Nothing."},
        ]
        rows.append({"id": str(number), "image": name, "conversations": turns})
        rows.append({"id": f"s{number}", "image": f"sam/images/sa_{number}.jpg", "conversations": turns})
    (tmp_path / SHAREGPT4V_FILE).write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path


@pytest.fixture
def coco(tmp_path: Path, cache: None) -> Path:
    """Parquet files with pictures inside."""
    import datasets

    pictures = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(CAPTIONED)]
    captions = [[f"Caption {number}.", "Another."] for number in range(CAPTIONED)]
    rows = datasets.Dataset.from_dict(
        {"image": pictures, "answer": captions},
        features=datasets.Features({"image": datasets.Image(), "answer": datasets.List(datasets.Value("string"))}),
    )
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "val-00000-of-00001.parquet")
    return tmp_path


def test_sharegpt4v(sharegpt4v: Path) -> None:
    samples = load_samples(f"sharegpt4v:{sharegpt4v}", 5, seed=3)
    assert len(samples) == 5
    for sample in samples:
        assert isinstance(sample.image, Path)
        assert sample.question == "What do you see?"
        assert sample.answer == f"Caption {int(sample.image.stem)}."
    assert samples == load_samples(f"sharegpt4v:{sharegpt4v}", 5, seed=3)
    assert samples != load_samples(f"sharegpt4v:{sharegpt4v}", 5, seed=4)
    assert len(load_samples(f"sharegpt4v:{sharegpt4v}")) == CAPTIONED


def test_coco(coco: Path) -> None:
    samples = load_samples(f"coco:{coco}", 5, seed=3)
    for sample in samples:
        (picture,) = sample.pictures
        assert sample.answer == f"Caption {np.asarray(open_image(picture))[0, 0, 0]}."
    assert hash_samples(samples) == hash_samples(load_samples(f"coco:{coco}", 5, seed=3))


def remove_a_picture(folder: Path) -> None:
    for path in folder.glob("coco/train2017/*"):
        path.unlink()


def rename_a_column(folder: Path) -> None:
    path = folder / SHAREGPT4V_FILE
    path.write_text(path.read_text(encoding="utf-8").replace('"image"', '"picture"'), encoding="utf-8")


def leave_no_coco(folder: Path) -> None:
    path = folder / SHAREGPT4V_FILE
    path.write_text(path.read_text(encoding="utf-8").replace("coco/", "other/"), encoding="utf-8")


def cut_off(folder: Path) -> None:
    path = folder / SHAREGPT4V_FILE
    path.write_text(path.read_text(encoding="utf-8")[:-50], encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_a_picture, "no picture"),
        (rename_a_column, "no column 'image'"),
        (leave_no_coco, "no picture of COCO"),
        (cut_off, "cannot be loaded"),
    ],
)
def test_damaged_captions(sharegpt4v: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(sharegpt4v)
    with pytest.raises(CalibrationError, match=message):
        load_samples(f"sharegpt4v:{sharegpt4v}", 5)


def test_what_is_not_there(tmp_path: Path) -> None:
    for source, message in [
        ("sharegpt4v", "sharegpt4v:FOLDER"),
        (f"coco:{tmp_path / 'none'}", "no folder"),
        (f"coco:{tmp_path}", r"no val-\*\.parquet"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            load_samples(source)


def test_without_datasets(coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(captions, "import_module", missing)
    with pytest.raises(CalibrationError, match="pip install"):
        load_samples(f"coco:{coco}")


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*_args: object, **_options: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(CalibrationError, match=r"Couldn't reach the Hub\. .*coco:FOLDER"):
        load_samples("coco", 5)


def test_fewer_samples_than_were_asked_for_are_said(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "data.jsonl", *({"text": f"text {number}"} for number in range(3)))
    with pytest.warns(CommonNotice, match=r"^7 calibration samples were asked for; '.*data\.jsonl' holds 3, and all"):
        assert len(load_samples(source, 7)) == 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("count", "asked"), [(7, False), (3, True), (None, True)])
def test_a_default_number_is_silent(tmp_path: Path, count: int | None, asked: bool) -> None:
    source = write_lines(tmp_path / "data.jsonl", *({"text": f"text {number}"} for number in range(3)))
    assert len(load_samples(source, count, asked=asked)) == 3


def test_only_a_number_in_the_recipe_was_asked_for() -> None:
    assert not make_recipe(calibration={"source": "demo"}).resolved().calibration.asks
    assert make_recipe(calibration={"samples": 128}).calibration.asks
