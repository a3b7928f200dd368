r"""Assemble the real models that are not vision-language models, with data to calibrate and to measure them.

    python benchmarks/assemble_real_models.py smollm2 OUT
    python benchmarks/assemble_real_models.py dinov2 OUT

`smollm2` is SmolLM2-135M-Instruct. OUT/data gets `calibration.jsonl` (pieces of 128 tokens of Wikipedia articles),
`evaluation.jsonl` (beginnings of other articles) and `news.jsonl` (Australian news): lines of `text`.

`dinov2` is DINOv2 ViT-S/14, reading 112 x 112 pictures. OUT/data gets `calibration.jsonl` and `evaluation.jsonl`
(pictures of easy-VQA and cuttings of photographs; no questions), and `probe_train.jsonl` and `probe_test.jsonl`
(easy-VQA pictures with their shape and their colour).

Everything comes out of packages (up to 200 MB, through pip), and the same each time. Needs the extra `eval`. Quantize
one with

    qe-edge quantize OUT -o checkpoint --calibration OUT/data/calibration.jsonl [--modules visual]

The vision-language model of `assemble_real_vlm.py` is made of these two.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import easy_vqa
import torch
from assemble_real_vlm import IMAGE_SIZE, IMAGENET_MEAN, IMAGENET_STD, LANGUAGE, ORIGIN_KEYS, PATCH_SIZE, VISION
from make_demo_data import SEED, SHAPES
from PIL import Image
from real_vlm.dinov2 import read_dinov2_checkpoint
from real_vlm.listing import write_list
from real_vlm.packages import PackagedFile
from real_vlm.wikipedia import read_articles
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from qe_edge.system.atomic import atomic_folder
from qe_edge.system.errors import QEError

GENSIM = "gensim==4.4.0"
WIKIPEDIA = PackagedFile(
    GENSIM,
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
NEWS = PackagedFile(
    GENSIM, "gensim/test/test_data/lee.cor", "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e"
)
PHOTOGRAPHS = {  # of scikit-image: name and hash; every second one is held out
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
    "camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
    "grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
    "gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
    "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
    "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
    "motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    "moon.png": "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577",
    "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
}
HELD_OUT_ARTICLES = 20
PIECE = 128  # tokens of a calibration text
PIECES_PER_ARTICLE = 6
BEGINNING = 2000  # characters of an article that is evaluated
DRAWN_PICTURES = {"calibration": 128, "evaluation": 130, "probe_train": 600, "probe_test": 200}
CUTTING = 224  # pixels


def assemble_smollm2(part: Path, scratch: Path) -> int:
    """Write model, tokenizer and texts to `part`; returns the number of parameters.

    Raises:
        ArtifactError: If a package cannot be had or holds something else.
    """
    gguf = LANGUAGE.fetch(scratch)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # the file that it was read from has no say any more: transformers would not save it as it is
    config = {key: value for key, value in packed.config.to_dict().items() if key not in ORIGIN_KEYS}
    model: Any = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(packed.state_dict())
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=end)
    model.to(torch.bfloat16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    articles = read_articles(WIKIPEDIA.fetch(scratch))
    calibration, held_out = articles[:-HELD_OUT_ARTICLES], articles[-HELD_OUT_ARTICLES:]
    news = NEWS.fetch(scratch).read_text(encoding="latin-1").splitlines()
    write_lines(
        part / "data" / "calibration.jsonl", texts(piece for text in calibration for piece in pieces(tokenizer, text))
    )
    write_lines(part / "data" / "evaluation.jsonl", texts(text[:BEGINNING] for text in held_out))
    write_lines(part / "data" / "news.jsonl", texts(line.strip() for line in news if line.strip()))
    return int(model.num_parameters())


def pieces(tokenizer: Any, text: str) -> list[str]:  # noqa: ANN401 - tokenizers share no typed base
    """`PIECES_PER_ARTICLE` pieces of `PIECE` tokens, evenly spread over a text."""
    places = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    step = max((len(places) - PIECE) // PIECES_PER_ARTICLE, PIECE)
    starts = range(0, len(places) - PIECE, step)[:PIECES_PER_ARTICLE]
    return [text[places[start][0] : places[start + PIECE - 1][1]] for start in starts]


def assemble_dinov2(part: Path, scratch: Path) -> int:
    """Write model, image processor and pictures to `part`; returns the number of parameters.

    Raises:
        ArtifactError: If a package cannot be had or holds something else.
    """
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        image_size=37 * PATCH_SIZE,
        patch_size=PATCH_SIZE,
        layer_norm_eps=1e-6,
    )
    state = read_dinov2_checkpoint(VISION.fetch(scratch))
    # given a state, from_pretrained renames its tensors as this version of transformers wants them
    model: Any = Dinov2Model.from_pretrained(None, config=config, state_dict=state)
    model.save_pretrained(part)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = BitImageProcessorPil(size=size, do_center_crop=False, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD)
    processor.save_pretrained(part)
    write_pictures(part / "data", scratch)
    return int(model.num_parameters())


def write_pictures(folder: Path, scratch: Path) -> None:
    """Pictures and the JSONL files that name them."""
    cuttings = cut_photographs(folder / "images" / "photographs", scratch)
    training = label_pictures(zip(*easy_vqa.get_train_questions(), strict=True))
    held_out = label_pictures(zip(*easy_vqa.get_test_questions(), strict=True))
    rng = random.Random(SEED)
    parts = {
        "calibration": (training, easy_vqa.get_train_image_paths()),
        "evaluation": (held_out, easy_vqa.get_test_image_paths()),
        "probe_train": (training, easy_vqa.get_train_image_paths()),
        "probe_test": (held_out, easy_vqa.get_test_image_paths()),
    }
    for name, (labels, paths) in parts.items():
        chosen = sorted(rng.sample(sorted(labels), DRAWN_PICTURES[name]))
        (folder / "images" / name).mkdir(parents=True)
        copies = {number: folder / "images" / name / f"{number:04d}.png" for number in chosen}
        for number, copy in copies.items():
            shutil.copyfile(paths[number], copy)
        if name.startswith("probe"):
            lines = [
                {"image": place(copies[number], folder), "question": topic, "answer": labels[number][topic]}
                for number in chosen
                for topic in ("shape", "color")
            ]
        else:
            pictures = [*copies.values(), *cuttings[name]]
            lines = [{"image": place(path, folder)} for path in pictures]
        write_lines(folder / f"{name}.jsonl", lines)


def place(path: Path, folder: Path) -> str:
    """A picture's path as a JSONL file in `folder` names it."""
    return path.relative_to(folder).as_posix()


def label_pictures(questions: Iterable[tuple[str, str, int]]) -> dict[int, dict[str, str]]:
    """Shape and colour of the easy-VQA pictures whose open questions tell both."""
    labels: dict[int, dict[str, str]] = defaultdict(dict)
    for _, answer, picture in questions:
        if answer not in {"yes", "no"}:
            labels[picture]["shape" if answer in SHAPES else "color"] = answer
    return {picture: known for picture, known in labels.items() if len(known) == 2}


def cut_photographs(folder: Path, scratch: Path) -> Mapping[str, Sequence[Path]]:
    """Up to five cuttings of every photograph, corners and centre, by the part that they belong to."""
    folder.mkdir(parents=True)
    parts: dict[str, list[Path]] = {"calibration": [], "evaluation": []}
    for number, (name, sha256) in enumerate(PHOTOGRAPHS.items()):
        packaged = PackagedFile("scikit-image==0.25.2", f"skimage/data/{name}", sha256)
        with Image.open(packaged.fetch(scratch)) as file:
            photograph = file.convert("RGB")
        right, bottom = photograph.width - CUTTING, photograph.height - CUTTING
        corners = {(0, 0), (right, 0), (0, bottom), (right, bottom), (right // 2, bottom // 2)}
        for count, (left, top) in enumerate(sorted(corners)):
            path = folder / f"{Path(name).stem}_{count}.png"
            photograph.crop((left, top, left + CUTTING, top + CUTTING)).save(path)
            parts["evaluation" if number % 2 else "calibration"].append(path)
    return parts


def texts(found: Iterable[str]) -> list[dict[str, str]]:
    """Lines of running text."""
    return [{"text": text} for text in found]


def write_lines(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    """Write a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8", newline="\n")


MODELS: dict[str, Callable[[Path, Path], int]] = {"smollm2": assemble_smollm2, "dinov2": assemble_dinov2}


def main() -> None:
    """Write one model and its data; the folder appears only when it is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("output", type=Path, metavar="OUT", help="folder of the model")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch, atomic_folder(arguments.output) as part:
            parameters = MODELS[arguments.model](part, Path(scratch))
            write_list(part, "assemble_real_models")
    except QEError as error:
        sys.exit(str(error))
    print(f"{parameters / 1e6:.1f} M parameters in {arguments.output}, data in {arguments.output / 'data'}")
    print(json.dumps({"script": "assemble_real_models", "model": arguments.model, "parameters": parameters}))


if __name__ == "__main__":
    main()
