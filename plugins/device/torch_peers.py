"""What a user of torch would run instead: cuBLAS in FP16 and INT8, torch's INT4 product, and humming-kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

Body = Callable[[], object]
Make = Callable[[Any, int, int, int, int, str], Body]


@dataclass(frozen=True)
class Peer:
    """A product to compare with.

    Attributes:
        name: What the file calls it.
        make: Given torch, in_features, out_features, tokens, copies and device: what multiplies with every copy once.
        weight_bits: Bits of a weight in memory.
        least_tokens: Fewest tokens that it takes.
        most_tokens: Most tokens for which it is made.
    """

    name: str
    make: Make
    weight_bits: int
    least_tokens: int = 1
    most_tokens: int = 1 << 20


def float16(torch: Any, k: int, n: int, tokens: int, count: int, device: str) -> Body:  # noqa: ANN401 - torch has no types here
    """cuBLAS, weights as `[n, k]`."""
    weights = [torch.randn(n, k, device=device).half() for _ in range(count)]
    x, y = torch.randn(tokens, k, device=device).half(), torch.empty(tokens, n, device=device, dtype=torch.half)
    return lambda: [torch.mm(x, weight.t(), out=y) for weight in weights]


def int8(torch: Any, k: int, n: int, tokens: int, count: int, device: str) -> Body:  # noqa: ANN401
    """CuBLAS's integer product alone, without quantizing x or scaling y."""
    weights = [torch.randint(-127, 127, (n, k), device=device, dtype=torch.int8) for _ in range(count)]
    x = torch.randint(-127, 127, (tokens, k), device=device, dtype=torch.int8)
    return lambda: [torch._int_mm(x, weight.t()) for weight in weights]


def int4(torch: Any, k: int, n: int, tokens: int, count: int, device: str) -> Body:  # noqa: ANN401
    """The weight-only product: bfloat16 x, groups of 128."""
    product, shape = torch.ops.aten._weight_int4pack_mm, (n // 8, k // 128, 32, 4)
    weights = [torch.randint(0, 2**31 - 1, shape, device=device, dtype=torch.int32) for _ in range(count)]
    x = torch.randn(tokens, k, device=device).bfloat16()
    scales = torch.rand(k // 128, n, 2, device=device).bfloat16()
    return lambda: [product(x, weight, 128, scales) for weight in weights]


def humming(weight: str, act: str | None) -> Make:
    """humming-kernels; groups of 128 where activations have 16 bits."""

    def make(torch: Any, k: int, n: int, tokens: int, count: int, device: str) -> Body:  # noqa: ANN401
        layer_class = import_module("humming.layer").HummingLayer
        first = layer_class(
            shape_n=n, shape_k=k, weight_config={"dtype": weight, **({} if act else {"group_size": 128})},
            input_config={"dtype": act} if act else None, torch_dtype=torch.float16,
        ).to(device)  # fmt: skip
        first.load_from_unquantized(torch.randn(n, k, dtype=torch.float16, device=device) * 0.02)
        first.transform()
        layers = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
        x = torch.randn(tokens, k, device=device).half()
        return lambda: [layer(x) for layer in layers]

    return make


FLOAT16 = "cuBLAS FP16"
HUMMING = "Humming"
PEERS = (
    Peer(FLOAT16, float16, 16),
    Peer("cuBLAS INT8", int8, 8, least_tokens=17),  # fewer are refused
    Peer("torch INT4 g128", int4, 4, most_tokens=64),
    Peer(f"{HUMMING} W4A16 g128", humming("int4", None), 4),
    Peer(f"{HUMMING} W4A8", humming("int4", "int8"), 4),
    Peer(f"{HUMMING} W3A8", humming("int3", "int8"), 3),
)


def float16_step(torch: Any, pairs: list[tuple[int, int]], tokens: int, device: str) -> Body:  # noqa: ANN401
    """The linear layers of some blocks in a row, in cuBLAS FP16."""
    weights = [torch.randn(n, k, device=device).half() for k, n in pairs]
    xs = {k: torch.randn(tokens, k, device=device).half() for k, _ in pairs}
    ys = {n: torch.empty(tokens, n, device=device, dtype=torch.half) for _, n in pairs}
    return lambda: [torch.mm(xs[w.shape[1]], w.t(), out=ys[w.shape[0]]) for w in weights]


def graph_time(torch: Any, body: Body, repeats: int = 11, warm_ups: int = 2) -> float:  # noqa: ANN401
    """Median microseconds of `body`, replayed from a CUDA graph, as `Gpu.graph_time` takes it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        body()
    times = []
    for _ in range(warm_ups + repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1000.0 * start.elapsed_time(stop))
    return float(sorted(times[warm_ups:])[repeats // 2])
