"""The tensors of a cache, as the inputs of a language graph name them.

A tensor `past_key_values.{layer}.key` or `.value` is `[batch, heads, capacity, head_dim]` and grows with the context.
Any other, as `past_key_values.{layer}.conv`, is a state: `[batch, ...]` of fixed sizes. It stands for all tokens so
far, and cannot be taken back to fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qe_edge.runtime.graph_specs import TensorSpec

PAST, PRESENT = "past_key_values.", "present."  # how the language graph's inputs and outputs of the cache begin
GROWING = (".key", ".value")
AXES = 4  # of keys and values
LARGEST = 1 << 28  # numbers of a state of one row
WIDEST = 4096  # number of heads, and width of a head


def is_state(name: str) -> bool:
    """Whether a cache's tensor has the same size for every context.

    Example:
        >>> is_state("past_key_values.0.key"), is_state("past_key_values.1.conv")
        (False, True)
    """
    return not name.endswith(GROWING)


def cache_inputs(inputs: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    """The inputs of a graph that are tensors of its cache.

    Example:
        >>> from qe_edge.runtime.graph_specs import TensorSpec
        >>> names = ("inputs_embeds", "past_key_values.0.conv")
        >>> [spec.name for spec in cache_inputs([TensorSpec(name=name, dtype="float32", shape=(1,)) for name in names])]
        ['past_key_values.0.conv']
    """
    return tuple(spec for spec in inputs if spec.name.startswith(PAST))


def output_of(name: str) -> str:
    """The output that belongs to an input.

    Example:
        >>> output_of("past_key_values.0.key")
        'present.0.key'
    """
    return name.replace(PAST, PRESENT, 1)


def sizes_of(spec: TensorSpec, batch: int, capacity: int) -> tuple[int, ...]:
    """Shape of a tensor of a cache.

    Args:
        spec: Its entry in the manifest.
        batch: Rows.
        capacity: Tokens that fit into a row.

    Example:
        >>> from qe_edge.runtime.graph_specs import TensorSpec
        >>> key = TensorSpec(name="past_key_values.0.key", dtype="float32", shape=("batch", 2, "capacity", 8))
        >>> conv = TensorSpec(name="past_key_values.1.conv", dtype="float32", shape=("batch", 64, 2))
        >>> sizes_of(key, 1, 512), sizes_of(conv, 1, 512)
        ((1, 2, 512, 8), (1, 64, 2))
    """
    if is_state(spec.name):
        return (batch, *(int(size) for size in spec.shape[1:]))
    return (batch, int(spec.shape[1]), capacity, int(spec.shape[3]))


def check_cache(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], layers: int) -> None:
    """Refuse a graph's cache that runtimes cannot keep.

    Args:
        inputs: The language graph's inputs.
        outputs: Its outputs.
        layers: Layers with keys and values.

    Raises:
        ValueError: If a tensor has another shape than its name says, or an output is missing.

    Example:
        >>> from qe_edge.runtime.graph_specs import TensorSpec
        >>> key = TensorSpec(name="past_key_values.0.key", dtype="float32", shape=("batch", 2, "capacity", 8))
        >>> check_cache([key], [], layers=1)
        Traceback (most recent call last):
            ...
        ValueError: the cache's 'past_key_values.0.key' has no output of its type and shape
    """
    written = {spec.name: spec for spec in outputs}
    found = cache_inputs(inputs)
    for spec in found:
        given = written.get(output_of(spec.name))
        if given is None or given.dtype != spec.dtype or len(given.shape) != len(spec.shape):
            raise ValueError(f"the cache's '{spec.name}' has no output of its type and shape")
        sizes = [size if isinstance(size, int) else 0 for size in spec.shape[1:]]
        if is_state(spec.name):
            fits = len(sizes) > 0 and min(sizes) >= 1 and prod(sizes) <= LARGEST
        else:
            fits = len(spec.shape) == AXES and all(1 <= size <= WIDEST for size in sizes[::2])
        if not fits:
            raise ValueError(f"the cache's '{spec.name}' has the shape {list(spec.shape)}")
    grown = sum(not is_state(spec.name) for spec in found)
    if grown != 2 * layers:
        raise ValueError(f"the cache has {grown} tensors of keys and values for {layers} layers")
