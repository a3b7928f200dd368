"""The cache of a batch: buffers of a fixed capacity, and states, that live where a backend computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from qe_edge.runtime.cache_tensors import PAST, PRESENT, is_state, output_of
from qe_edge.runtime.sessions import Array, DeviceArray
from qe_edge.system.errors import InputError


@dataclass
class KVCache:
    """Keys, values and states of the tokens that a batch has read. Places beyond a row's length are never read.

    Attributes:
        batch: Rows.
        capacity: Tokens that fit into a row.
        past: Buffers under the names of the language graph's inputs.
        present: Buffers that the next call writes, under the names of its outputs: the same ones where it writes in
            place. States have always others.
        lengths: Tokens of every row, int64 `[batch]`.
        in_place: Whether a call writes keys and values where it reads them.
        states: Names of the inputs that are states.
        mask: The graph's `attention_mask`, int64 `[batch, capacity]`: 1 on text, numbers of pictures where a model's
            pictures have some, 0 beyond a row's length.
    """

    batch: int
    capacity: int
    past: dict[str, Array]
    present: dict[str, Array]
    lengths: np.ndarray = field(init=False)
    mask: np.ndarray = field(init=False)
    in_place: bool = field(init=False)
    states: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = np.zeros(self.batch, np.int64)
        self.mask = np.zeros((self.batch, self.capacity), np.int64)
        self.states = tuple(name for name in self.past if is_state(name))
        grown = {name: array for name, array in self.past.items() if name not in self.states}
        self.in_place = all(self.present[output_of(name)] is array for name, array in grown.items())

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        found = {id(array): array for array in (*self.past.values(), *self.present.values())}
        return sum(int(np.prod(array.shape)) * array.dtype.itemsize for array in found.values())

    def truncate(self, length: int) -> None:
        """Forget every token after the first `length` of each row.

        Raises:
            InputError: If `length` is negative, or lies within the tokens that a state stands for.
        """
        if length < 0:
            raise InputError(f"A cache cannot hold {length} tokens.", "Give 0 to forget everything.")
        if self.states and length and self.lengths.max() > length:
            raise InputError(
                f"A cache of {self.lengths.max()} tokens cannot be cut to {length}: its layers keep states of all.",
                "Give 0, and read the tokens again.",
            )
        if length == 0:
            for name in self.states:
                _clear(self.past[name])
        self.lengths = np.minimum(self.lengths, length)
        self.mask[:, length:] = 0

    def with_new(self, lengths: np.ndarray, numbers: np.ndarray | None) -> np.ndarray:
        """The mask after a call: `[batch, capacity]`.

        Args:
            lengths: New tokens of every row.
            numbers: The mask on the new tokens, right-padded `[batch, sequence]`; None for ones. Numbers of pictures go
                on from the pictures that the cache holds.
        """
        mask: np.ndarray = self.mask.copy()
        for row, (start, new) in enumerate(zip(self.lengths, lengths, strict=True)):
            found = 1 if numbers is None else numbers[row, :new]
            earlier = int(mask[row].max(initial=1)) - 1
            mask[row, start : start + new] = np.where(np.asarray(found) > 1, found + earlier, found)
        return mask

    def written(self, outputs: dict[str, Array], kept: np.ndarray | None = None) -> None:
        """Take the outputs of a call as the new cache; the next call may write into the old one.

        Args:
            outputs: Tensors by the names of the graph's outputs.
            kept: Rows whose states become those of the call, bool `[batch]`; None for all.
        """
        if kept is not None:
            for name in self.states:
                for row in np.flatnonzero(~kept).tolist():
                    _take_row(outputs[output_of(name)], self.past[name], row)
        spare = self.past
        self.past = {name.replace(PRESENT, PAST, 1): array for name, array in outputs.items()}
        self.present = {output_of(name): array for name, array in spare.items()}


def new_cache(
    batch: int, capacity: int, zeros: Callable[[tuple[int, ...], np.dtype[np.generic]], Array],
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype[np.generic]]], *, in_place: bool,
) -> KVCache:  # fmt: skip
    """An empty cache.

    Args:
        batch: Rows.
        capacity: Tokens that fit into a row.
        zeros: Makes a buffer of a shape and type.
        tensors: Shapes and types of the language graph's inputs that are the cache.
        in_place: Whether a call may write keys and values where it reads them.

    Example:
        >>> half, single = np.dtype(np.float16), np.dtype(np.float32)
        >>> tensors = {"past_key_values.0.key": ((1, 2, 8, 4), half), "past_key_values.1.conv": ((1, 16, 2), single)}
        >>> cache = new_cache(1, 8, np.zeros, tensors, in_place=True)
        >>> cache.nbytes, cache.states  # a state has two buffers
        (384, ('past_key_values.1.conv',))
    """
    past = {name: zeros(*kind) for name, kind in tensors.items()}
    present = {
        output_of(name): past[name] if in_place and not is_state(name) else zeros(*kind)
        for name, kind in tensors.items()
    }
    return KVCache(batch, capacity, past, present)


def _clear(array: Array) -> None:
    if isinstance(array, DeviceArray):
        array.clear()
    else:
        array[...] = 0


def _take_row(array: Array, other: Array, row: int) -> None:
    if isinstance(array, DeviceArray) and isinstance(other, DeviceArray):
        array.take_row(other, row)
    else:
        np.asarray(array)[row] = np.asarray(other)[row]


def right_places(attention_mask: np.ndarray) -> np.ndarray:
    """For every place of right-padded rows the place in left-padded ones, int64 `[batch, sequence]`.

    Args:
        attention_mask: `[batch, sequence]`, 0 on the padding, which stands left.

    Example:
        >>> right_places(np.array([[0, 0, 1, 1], [1, 1, 1, 1]]))
        array([[2, 3, 3, 3],
               [0, 1, 2, 3]])
    """
    sequence = attention_mask.shape[1]
    start = sequence - attention_mask.sum(1)
    places: np.ndarray = np.minimum(np.arange(sequence) + start[:, None], sequence - 1)
    return places


def take_tokens(values: np.ndarray, places: np.ndarray, axis: int) -> np.ndarray:
    """Entries of an array with axes batch and token.

    Args:
        values: Any array.
        places: `[batch, tokens]`, which tokens of each row.
        axis: Of the batch; the tokens' is the next one.

    Example:
        >>> take_tokens(np.array([[5, 6, 7]]), np.array([[2, 0]]), 0).tolist()
        [[7, 5]]
    """
    shape = [1] * values.ndim
    shape[axis : axis + 2] = places.shape
    taken: np.ndarray = np.take_along_axis(values, places.reshape(shape), axis + 1)
    return taken
