"""Write a model of an original layout as a folder that transformers' own classes load; none of its code runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from qe_edge.models.configuration import load_family
from qe_edge.models.guard import Guard, check_values
from qe_edge.models.image_processors import pil_image_processor
from qe_edge.models.internlm2_tokenizer import read_internlm2_tokenizer
from qe_edge.models.internvl_original import ORIGINAL, OriginalConfig, converted_config, converted_tensors
from qe_edge.models.loading import check_exact
from qe_edge.models.model_files import find_file
from qe_edge.models.tokenizers import check_tokenizer_files
from qe_edge.models.weight_files import INDEX, SINGLE, check_links, weight_headers
from qe_edge.system.atomic import atomic_folder
from qe_edge.system.errors import ModelError, NumericalError, printable
from qe_edge.system.json_files import read_json_table
from qe_edge.system.progress import Progress, Silent, track

REMEDY = "Get the original model again."
START, IMAGE, STOP = "<img>", "<IMG_CONTEXT>", "</img>"  # around and in place of a picture's features
END = "<|im_end|>"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the original prepares pictures
BICUBIC = 3
# the authors' own words, which the models were trained with
FIRST = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
SECOND = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"  # noqa: RUF001
SYSTEMS = {  # system message, and what stands between turns, by the template that config.json names
    "internlm2-chat": (FIRST, ""),
    "Hermes-2": (FIRST, ""),
    "internvl2_5": (SECOND, "\n"),
}
TEMPLATE = (
    "{{ bos }}{% if messages[0].role != 'system' %}<|im_start|>system\n{{ system }}<|im_end|>{{ gap }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>{{ gap }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def convert_model(source: str, out: Path, *, progress: Progress | None = None) -> None:
    """Write an InternVL model of OpenGVLab's layout (`internvl_chat`, InternLM2 or Qwen2 text) in transformers' own.

    The folder appears only when it is complete. Weights are converted file by file, so memory for the largest is
    needed; their precision stays.

    Args:
        source: Folder or hub id of the original model.
        out: Folder to write.
        progress: Where to report progress.

    Raises:
        ModelError: If the model is none of this layout, or holds what transformers' own classes do not compute.
        ArtifactError: If a file is damaged.
        NumericalError: If a weight is NaN or infinite.
        ResourceError: If the disk is full.

    Example:
        >>> convert_model("OpenGVLab/InternVL2-2B", Path("internvl2-2b-hf"))  # doctest: +SKIP
    """
    original = _read_config(source)
    if Path(source).is_dir():
        check_links(Path(source))
    headers = weight_headers(source)
    with atomic_folder(out) as part:
        tokenizer = _tokenizer(source, original)
        image, end = (tokenizer.convert_tokens_to_ids(token) for token in (IMAGE, END))
        _write_json(part / "config.json", converted_config(original, image, end))
        _write_json(part / "generation_config.json", {"eos_token_id": end, "pad_token_id": tokenizer.pad_token_id})
        with Guard(f"The tokenizer of '{source}' cannot be written", REMEDY):  # half a surrogate pair is no UTF-8
            tokenizer.save_pretrained(part)
        _image_processor(original).save_pretrained(part)
        weights: dict[str, str] = {}
        total = 0
        with track(progress or Silent(), "Converting", float(len(headers))) as tracked:
            for number, path in enumerate(headers, 1):
                name = SINGLE if len(headers) == 1 else f"model-{number:05d}-of-{len(headers):05d}.safetensors"
                tensors: dict[str, Tensor] = {}
                for key, tensor in load_file(path).items():
                    if not bool(tensor.isfinite().all()):
                        raise NumericalError(f"The weights '{printable(key)[:200]}' hold NaN or infinity.", REMEDY)
                    tensors |= converted_tensors(original, key, tensor)
                save_file(tensors, part / name, metadata={"format": "pt"})
                weights |= dict.fromkeys(tensors, name)
                total += sum(tensor.nbytes for tensor in tensors.values())
                tracked.advance(1.0, name)
        if len(headers) > 1:
            _write_json(part / INDEX, {"metadata": {"total_size": total}, "weight_map": weights})
        check_converted(part)


def _read_config(source: str) -> OriginalConfig:
    path = find_file(source, "config.json")
    if path is None:
        raise ModelError(f"'{source}' has no config.json.", "Give the folder of a downloaded model, or a hub id.")
    values = read_json_table(path, error=ModelError, remedy=REMEDY)
    if values.get("model_type") != ORIGINAL:
        raise ModelError(
            f"'{source}' is a '{printable(str(values.get('model_type')))[:60]}' model; only OpenGVLab's layout "
            f"'{ORIGINAL}' is converted.",
            "A model in transformers' own layout needs no conversion: give it to 'qe-edge quantize'.",
        )
    original = check_values(OriginalConfig, values, path, REMEDY, ModelError)
    if original.template not in SYSTEMS:
        raise ModelError(
            f"'{source}' names the conversation template '{printable(original.template)[:60]}'.",
            f"Known: {', '.join(SYSTEMS)}.",
        )
    return original


def _tokenizer(source: str, original: OriginalConfig) -> Any:  # noqa: ANN401 - tokenizers share no typed base
    """The tokenizer with the chat template that the original code has in Python."""
    marks = {"start_image_token": START, "end_image_token": STOP, "context_image_token": IMAGE}
    bos = ""
    with Guard(f"The tokenizer of '{source}' cannot be converted", REMEDY):
        if original.llm_config.model_type == "qwen2":
            check_tokenizer_files(source)
            tokenizer = Qwen2Tokenizer.from_pretrained(source, extra_special_tokens=marks)
        else:
            path, settings = find_file(source, "tokenizer.model"), find_file(source, "tokenizer_config.json")
            if path is None or settings is None:
                raise ModelError(f"'{source}' lacks tokenizer.model or tokenizer_config.json.", REMEDY)
            table = read_json_table(settings, error=ModelError, remedy=REMEDY)
            added = table.get("added_tokens_decoder") or {}
            backend = read_internlm2_tokenizer(path, added)
            bos = "<s>" if table.get("add_bos_token", True) else ""
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=backend,
                bos_token="<s>",  # noqa: S106 - a token of a vocabulary
                unk_token="<unk>",  # noqa: S106
                pad_token="</s>",  # noqa: S106
                extra_special_tokens=marks,
            )
        tokenizer.eos_token = END
        known = tokenizer.get_vocab()
        missing = [token for token in (START, IMAGE, STOP, END) if token not in known]
    if missing:
        raise ModelError(f"The tokenizer of '{source}' has no token {', '.join(missing)}.", REMEDY)
    token, highest = max(known.items(), key=lambda item: item[1])
    if highest >= original.llm_config.vocab_size:
        raise ModelError(
            f"Token '{printable(token)[:60]}' of '{source}' has number {highest}; the embedding has "
            f"{original.llm_config.vocab_size} rows.",
            REMEDY,
        )
    system, gap = SYSTEMS[original.template]
    template = TEMPLATE.replace("{{ system }}", system).replace("{{ bos }}", bos)
    tokenizer.chat_template = template.replace("{{ gap }}", "{{ '\\n' }}" if gap else "")
    return tokenizer


def _image_processor(original: OriginalConfig) -> Any:  # noqa: ANN401 - transformers' own class
    """Tiles of the vision encoder's size, with a thumbnail after several."""
    most = original.max_dynamic_patch if original.dynamic_image_size else 1
    if most > 1 and not original.use_thumbnail:
        raise ModelError(
            "This model cuts pictures into tiles and shows no thumbnail; transformers' own processor always does.",
            "Choose a model whose config.json has use_thumbnail true, as all released ones do.",
        )
    side = original.vision_config.image_size
    return pil_image_processor("got_ocr2")(
        size={"height": side, "width": side},
        crop_to_patches=most > 1,
        min_patches=original.min_dynamic_patch,
        max_patches=most,
        image_mean=MEAN,
        image_std=DEVIATION,
        resample=BICUBIC,
    )


def check_converted(folder: Path) -> None:
    """Check that the new model has all its tensors and no other. This finds damage of the original.

    Raises:
        ModelError: If it has not, or if its tokenizer or image processor cannot be read.

    Example:
        >>> from qe_edge.demo import model_path
        >>> check_converted(model_path())  # fine: every tensor is there, and no other
    """
    family = load_family(str(folder))
    check_exact(str(folder), family)
    family.load_processor(str(folder))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
