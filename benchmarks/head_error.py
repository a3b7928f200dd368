"""What a head of 4 bits, and an embedding of 8, cost a language model whose other layers stay as they are.

    python benchmarks/head_error.py OUT

OUT is SmolLM2 as `assemble_real_models.py smollm2` makes it. Divergence from the original's predictions and the share
of equal most likely tokens, on news that calibration does not see: a head rounded to nearest, the head of
`--head int4`, and the embedding of `--embedding int8` under the original head.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from qe_edge.layers.linear import quantized_linears
from qe_edge.models.loading import LoadedModel, load_model
from qe_edge.models.rotation import last_norm
from qe_edge.numerics.grids import quantize_weight
from qe_edge.quantization.embedding import quantize_embedding
from qe_edge.quantization.head import head_of, quantize_head
from qe_edge.recipes.recipe import HEADS, make_recipe

TOKENS = 192  # of a text


def main() -> None:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=int, default=6, help="texts of the news (default 6)")
    arguments = parser.parse_args()
    loaded = load_model(str(arguments.model), torch.float32)
    seen = states(loaded, arguments.model / "data/calibration.jsonl", 32)
    news = states(loaded, arguments.model / "data/news.jsonl", arguments.texts)
    hidden = torch.cat([part[0] for part in normed(loaded, news)])
    name, head = head_of(loaded.model)
    weight, grid = head.weight.detach(), HEADS["int4"]
    logits = hidden @ weight.T
    found = {"head, nearest": compare(logits, hidden @ quantize_weight(weight, grid).decode().T)}
    quantize_head(loaded, grid, seen, [torch.ones(part.shape[:2]).numpy() for part in seen])
    found["--head int4"] = compare(logits, hidden @ quantized_linears(loaded.model)[name].decoded_weight().T)
    quantize_embedding(loaded, make_recipe(head="int4", embedding="int8"))
    rounded = normed(loaded, states(loaded, arguments.model / "data/news.jsonl", arguments.texts))
    found["--embedding int8"] = compare(logits, torch.cat([part[0] for part in rounded]) @ weight.T)
    print(f"{len(hidden)} tokens of news")
    for title, (divergence, same) in found.items():
        print(f"{title:<16} KL {divergence:.2g}  same top token {100 * same:.1f} %")
    print(json.dumps({"script": "head_error", "tokens": len(hidden), **found}))


def states(loaded: LoadedModel, lines: Path, count: int) -> list[Tensor]:
    """What the last decoder layer puts out for the first texts of a file, `[1, tokens, hidden]` each."""
    norm, found = last_norm(loaded.model), []
    if norm is None:
        raise SystemExit("The model has no norm before its head.")
    handle = norm.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].detach()))
    tokenizer = loaded.processor.tokenizer
    for line in lines.read_text(encoding="utf-8").splitlines()[:count]:
        ids = tokenizer(json.loads(line)["text"])["input_ids"][:TOKENS]
        with torch.no_grad():
            loaded.model(input_ids=torch.tensor([ids]))
    handle.remove()
    return found


def normed(loaded: LoadedModel, parts: list[Tensor]) -> list[Tensor]:
    """Inputs of the head."""
    norm = last_norm(loaded.model)
    with torch.no_grad():
        return [] if norm is None else [norm(part) for part in parts]


def compare(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """Mean divergence of two sets of predictions `[tokens, vocabulary]`, and the share of equal most likely tokens."""
    one, other = (torch.log_softmax(logits, -1) for logits in (wanted, found))
    divergence = float((one.exp() * (one - other)).sum(-1).mean())
    return divergence, float((one.argmax(-1) == other.argmax(-1)).float().mean())


if __name__ == "__main__":
    main()
