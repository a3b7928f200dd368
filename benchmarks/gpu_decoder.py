"""How fast a decoder of Qwen2-VL-2B's shapes is in PyTorch with the plugin's kernels, beside transformers' own FP16.

`gpu_model.py` calls this; alone it prints the same rows:

    python benchmarks/gpu_decoder.py --library libqe_plugin.so

Weights are random: a layer of every shape is packed once and copied. Memory of the GPU holds every copy, so that
weights come from there, as in a model.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, StaticCache

from qe_edge.layers.kernel_library import kernel_library, problem_of
from qe_edge.layers.linear import Adapters, QELinear, QuantizedLinear
from qe_edge.layers.packed_linear import PackedQELinear, _on_gpu
from qe_edge.numerics.grids import PER_CHANNEL, QuantizedWeight, pack_codes
from qe_edge.prepack.unpack import Form

SHAPES = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}  # on a CPU
LAYERS, VOCABULARY, PROMPT, NEW = 28, 151936, 1024, 32
FP16, PLAIN, RANK = "FP16", "W4A8", "W4A8, rank 64 INT4"
SCALE = 0.004  # of a code, so that outputs are as large as inputs
CALLS = 300  # of a layer, for its host's time


class StaticStep:
    """One decoded token of a decoder on a static cache.

    Its tensors are fixed and it asks the GPU nothing, so that a CUDA graph holds it and torch.compile sees one graph.

    Args:
        text: The decoder, from embeddings to hidden states.
        head: Hidden states to logits.
        embed: Tokens to embeddings.
        cache: The static cache, which the prompt is in already.
        capacity: Tokens of the cache.
    """

    def __init__(self, text: nn.Module, head: nn.Module, embed: nn.Module, cache: StaticCache, capacity: int) -> None:
        self.text, self.head, self.embed, self.cache = text, head, embed, cache
        device = head.weight.device
        self.ids = torch.zeros((1, 1), dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)  # in the cache
        self.positions = torch.zeros((3, 1, 1), dtype=torch.long, device=device)  # of the rotary embedding
        self.axes = 3
        self.columns = torch.arange(capacity, device=device)

    def at(self, ids: int, place: int, position: int) -> None:
        """Set the token and where it stands; what the cache holds from there on is forgotten."""
        self.ids.fill_(ids), self.place.fill_(place), self.positions.fill_(position)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(place)

    def logits(self) -> Tensor:
        """Logits `[1, 1, vocabulary]` of the token."""
        mask = (self.columns <= self.place)[None, None, None]
        positions = self.positions if self.axes == 3 else self.positions[0]
        hidden = self.text(
            inputs_embeds=self.embed(self.ids),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )[0]
        found: Tensor = self.head(hidden)
        return found

    def advance(self) -> Tensor:
        """Logits, and the likeliest token is the next one."""
        logits = self.logits()
        self.ids.copy_(logits.argmax(-1))
        self.place.add_(1), self.positions.add_(1)
        return logits


def capture(step: Callable[[], Tensor], warm_up: int = 2) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A step as a CUDA graph, and its output."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph, output


def config_of(device: str, layers: int, vocabulary: int) -> Qwen2Config:
    """Qwen2-VL-2B's decoder, or on a CPU a small one."""
    on_gpu = device.startswith("cuda")
    return Qwen2Config(
        **(SHAPES if on_gpu else SMALL),
        vocab_size=vocabulary if on_gpu else 512,
        num_hidden_layers=layers if on_gpu else 2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def random_layer(inputs: int, outputs: int, rank: int, bias: bool, library: str) -> PackedQELinear:
    """A W4A8 layer with random contents, packed for float16, on the CPU."""
    codes = torch.randint(-8, 8, (outputs, inputs), dtype=torch.int8)
    scales = torch.full((outputs, 1), SCALE * (1536 / inputs) ** 0.5, dtype=torch.float16)
    adapters = None
    if rank:
        down, up = (torch.randint(-7, 8, shape, dtype=torch.int8) for shape in ((rank, inputs), (outputs, rank)))
        small = torch.full((rank,), 1e-3).half(), torch.full((outputs,), 1e-3).half()
        adapters = Adapters(pack_codes(down, 4), pack_codes(up, 4), *small, rank, 0, 0, None)
    weight = QuantizedWeight(codes, scales, None, 4, PER_CHANNEL)
    omega = torch.rand(inputs).add(0.5).half()
    layer = QELinear(QuantizedLinear(weight, 8, omega, adapters), torch.zeros(outputs) + 0.01 if bias else None)
    return PackedQELinear(layer, torch.float16, library)


def make_decoder(config: Qwen2Config, device: str, kind: str, library: str) -> Qwen2ForCausalLM:
    """A decoder in float16 on the device with random weights; all but FP16 with packed layers."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    packed: dict[tuple[int, int, bool], PackedQELinear] = {}
    for name, module in list(model.model.named_modules()):
        if not isinstance(module, nn.Linear) or kind == FP16:
            continue
        key = (module.in_features, module.out_features, module.bias is not None)
        if key not in packed:
            packed[key] = random_layer(key[0], key[1], 64 if kind == RANK else 0, key[2], library).to(device)
        parent, _, leaf = name.rpartition(".")
        setattr(model.model.get_submodule(parent), leaf, copy.deepcopy(packed[key]))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=torch.float16, device=device)
            filled = empty.fill_(1.0) if parameter.dim() == 1 else empty.normal_(std=0.02)
            setattr(module, name, nn.Parameter(filled, requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return model.eval()


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def median_ms(body: Callable[[], object], device: str, repeats: int, warm_up: int = 2) -> float:
    """Milliseconds of a call, from its start until the GPU is done."""
    times = []
    for _ in range(warm_up + repeats):
        synchronize(device)
        started = time.perf_counter()
        body()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[warm_up:])


@torch.inference_mode()
def measure(config: Qwen2Config, device: str, kind: str, library: str) -> dict[str, float]:
    """Times of one model in milliseconds, and its memory in MiB."""
    on_gpu = device.startswith("cuda")
    prompt, new = (PROMPT, NEW) if on_gpu else (32, 3)
    before = torch.cuda.memory_allocated() if on_gpu else 0
    started = time.perf_counter()
    model = make_decoder(config, device, kind, library)
    synchronize(device)
    row: dict[str, float] = {"build_s": time.perf_counter() - started}
    if on_gpu:
        row["weights_mib"] = (torch.cuda.memory_allocated() - before) / 2**20
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(0, config.vocab_size, (1, prompt), device=device)
    row["prompt_ms"] = median_ms(lambda: model(ids, use_cache=True, logits_to_keep=1), device, 7 if on_gpu else 1)
    cache = DynamicCache(config=config)
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("The logits are not finite.")
    token = logits.argmax(-1)
    row["eager_ms"] = median_ms(lambda: model(token, past_key_values=cache, use_cache=True), device, new)
    row |= static_times(model, config, ids, device, new)
    if on_gpu:
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def static_times(model: Qwen2ForCausalLM, config: Qwen2Config, ids: Tensor, device: str, new: int) -> dict[str, float]:
    """Milliseconds a token on a static cache: step by step, and as a CUDA graph."""
    prompt = ids.shape[1]
    capacity = prompt + 128
    cache = StaticCache(config=config, max_cache_len=capacity)
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    step = StaticStep(model.model, model.lm_head, model.model.embed_tokens, cache, capacity)
    step.axes = 1
    step.at(5, prompt, prompt)
    row = {"static_ms": median_ms(step.advance, device, new)}
    if device.startswith("cuda"):
        step.at(5, prompt, prompt)
        graph, _ = capture(step.advance)
        step.at(5, prompt, prompt)
        row["graph_ms"] = median_ms(graph.replay, device, new)
    return row


@torch.inference_mode()
def host_times(device: str, library: str) -> dict[str, float]:
    """Microseconds of the host for a call with one token, and for its parts; the GPU is not waited for."""
    width = SHAPES["hidden_size"] if device.startswith("cuda") else SMALL["hidden_size"]
    layer = random_layer(width, width, 0, False, library).to(device)
    plain = nn.Linear(width, width, bias=False, device=device, dtype=torch.float16)
    x = torch.randn((1, width), device=device).half()
    bodies: dict[str, Callable[[], object]] = {"nn.Linear": lambda: plain(x), "packed module": lambda: layer(x)}
    operands = [getattr(layer, role) for role in ("weight", "columns", "scales", "zeros", "inv_omega", "down",
                                                  "down_scale", "up", "router", "counters")]  # fmt: skip
    operator = torch.ops.qe_edge.packed_linear.default
    bodies["operator"] = lambda: operator(x, *operands, layer.form, library)
    if device.startswith("cuda"):
        bodies["operator's body"] = lambda: _on_gpu(x, *operands, layer.form, library)
        problem = problem_of(Form(*layer.form), "f16", 1)
        workspace, opened = kernel_library(library).memory(problem)[0], kernel_library(library)
        names = ("weight", "scales", "zeros", "columns", "inv_omega", "down", "down_scale", "up", "router")
        y, room = torch.empty_like(x), torch.empty(max(workspace, 1), dtype=torch.uint8, device=device)
        parts = [x, *(getattr(layer, name) for name in names), y, room, layer.counters]
        addresses = [0 if part is None else part.data_ptr() for part in parts]
        stream = torch.cuda.current_stream().cuda_stream
        bodies["plan and launches"] = lambda: opened.run(problem, addresses, stream)
        bodies["workspace"] = lambda: torch.empty(max(workspace, 1), dtype=torch.uint8, device=x.device)
        bodies["y"] = lambda: x.new_empty((1, width))
        bodies["memory of a problem"] = lambda: opened.memory(problem)
        bodies["stream object"] = lambda: torch.cuda.current_stream(x.device).cuda_stream
    return {name: host_us(body, device) for name, body in bodies.items()}


def host_us(body: Callable[[], object], device: str) -> float:
    """Median microseconds of the host over runs short enough that the GPU's queue does not fill."""
    calls = CALLS if device.startswith("cuda") else 3
    times = []
    for _ in range(7):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            body()
        times.append(1e6 * (time.perf_counter() - started) / calls)
    synchronize(device)
    return statistics.median(times[1:])


COLUMNS = {"eager_ms": "decode, eager", "static_ms": "static cache", "graph_ms": "CUDA graph", "prompt_ms": "prompt"}


def print_row(kind: str, row: dict[str, float], peer: dict[str, float]) -> None:
    """A model's times, how many times as fast as the peer it is, and its memory."""
    cells = [
        f"{row[name]:.3f} ms ({peer[name] / row[name]:.2f}x)" if name in row and name in peer else "-"
        for name in COLUMNS
    ]
    memory = f"{row['weights_mib']:.0f} / {row['peak_mib']:.0f}" if "peak_mib" in row else "-"
    print(f"{kind:20}" + "".join(f"{cell:>20}" for cell in (*cells, memory)), flush=True)


def speed(device: str, library: str, layers: int = LAYERS, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """Rows of all models, printed as they come."""
    config = config_of(device, layers, vocabulary)
    if device.startswith("cuda"):
        torch.zeros(1, device=device)
        kernel_library(library).check()
    shape = f"{config.num_hidden_layers} layers of width {config.hidden_size}, vocabulary {config.vocab_size}"
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else "none"
    print(f"GPU {gpu}, decoder of {shape}; context and prompt {PROMPT if device.startswith('cuda') else 32} tokens")
    print(f"{'':20}" + "".join(f"{title:>20}" for title in (*COLUMNS.values(), "weights / peak MiB")))
    rows: dict[str, dict[str, float]] = {}
    for kind in (FP16, PLAIN, RANK):
        rows[kind] = measure(config, device, kind, library)
        print_row(kind, rows[kind], rows[FP16])
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    host = host_times(device, library)
    print("Host, us a call: " + ", ".join(f"{name} {value:.1f}" for name, value in host.items()), flush=True)
    return {
        "gpu": gpu,
        "layers": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
        "rows": rows,
        "host_us": host,
    }


def main() -> None:
    """Print the table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--library", type=Path, default=Path("libqe_plugin.so"))
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    options = parser.parse_args()
    found = speed(options.device, str(options.library.resolve()), options.layers, options.vocabulary)
    print(json.dumps({"script": "gpu_decoder", **found}))


if __name__ == "__main__":
    main()
