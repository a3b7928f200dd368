"""Weights that stay in safetensors files until they are needed.

In memory a placeholder stands for each of them: a tensor of its shape and dtype that repeats one NaN. It takes no
memory, and every result that is computed with it by mistake is NaN.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]
"""Makes another tensor of a tensor, of the same shape and dtype; the one that it gets stays as it is."""


@dataclass(frozen=True)
class Source:
    """The place of a tensor in a file.

    Attributes:
        path: A safetensors file.
        key: Its name in there.
    """

    path: Path
    key: str


def placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor that takes the memory of one number; it is NaN if the dtype has NaN.

    Example:
        >>> tensor = placeholder((1000, 1000), torch.bfloat16)
        >>> tuple(tensor.shape), tensor.untyped_storage().nbytes(), bool(tensor[0, 0].isnan())
        ((1000, 1000), 2, True)
    """
    value = torch.full((), float("nan") if dtype.is_floating_point else 0, dtype=dtype)
    return value.expand(shape)


def read_tensors(sources: Mapping[str, Source]) -> dict[str, Tensor]:
    """Tensors by the names that `sources` gives them, in memory of their own; every file is opened once.

    Example:
        >>> from safetensors.torch import save_file
        >>> save_file({"weight": torch.ones(2, 2)}, "model.safetensors")
        >>> read_tensors({"layer.weight": Source(Path("model.safetensors"), "weight")})
        {'layer.weight': tensor([[1., 1.],
                [1., 1.]])}
    """
    by_file: dict[Path, dict[str, str]] = defaultdict(dict)
    for name, source in sources.items():
        by_file[source.path][name] = source.key
    found: dict[str, Tensor] = {}
    for path, keys in by_file.items():
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(key).clone() for name, key in keys.items()}
    return found


def same_tensor(one: Source, other: Source) -> bool:
    """Whether two places hold the same numbers. Neither tensor is in memory as a whole.

    Example:
        >>> from safetensors.torch import save_file
        >>> save_file({"a": torch.ones(2), "b": torch.ones(2), "c": torch.zeros(2)}, "model.safetensors")
        >>> a, b, c = (Source(Path("model.safetensors"), key) for key in "abc")
        >>> same_tensor(a, b), same_tensor(a, c)
        (True, False)
    """
    with safe_open(one.path, framework="pt") as file, safe_open(other.path, framework="pt") as beside:
        return torch.equal(file.get_tensor(one.key), beside.get_tensor(other.key))


class StoredWeights:
    """The files that a model's tensors lie in, and the tensors that are not in memory now.

    A model that was loaded as a whole has none, and then all methods do nothing.

    Args:
        sources: Places of the tensors by their full names in the model.
        placeholders: Those tensors of the model that are placeholders already.

    Example:
        >>> from safetensors.torch import save_file
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> save_file({"weight": torch.eye(2)}, "model.safetensors")
        >>> stored = StoredWeights({"layer.weight": Source(Path("model.safetensors"), "weight")})
        >>> stored.release("layer", layer)
        >>> stored.is_absent(layer.weight), bool(layer.weight.isnan().all())
        (True, True)
        >>> with stored.held("layer", layer):
        ...     layer.weight.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(
        self, sources: Mapping[str, Source] | None = None, placeholders: Mapping[str, Tensor] | None = None
    ) -> None:
        self._sources = dict(sources or {})
        # kept, so that no other tensor gets the address of one
        self._placeholders = {(name, tensor.dtype): tensor.detach() for name, tensor in (placeholders or {}).items()}
        self._addresses = {tensor.data_ptr() for tensor in self._placeholders.values()}
        self._changes: dict[Source, list[Change]] = {}  # a tensor may have several names in the model

    def is_absent(self, tensor: Tensor) -> bool:
        """Whether a tensor of the model is a placeholder."""
        return tensor.data_ptr() in self._addresses

    def value(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor itself, or read the one that its placeholder stands for, for the caller alone."""
        if not self.is_absent(tensor):
            return tensor.detach()
        return self._read([name])[name].to(tensor.dtype)

    def rows(self, name: str, tensor: Tensor, numbers: Tensor) -> Tensor:
        """Some rows of a tensor, without reading the others. Its changes, if any, have to change each row alone.

        Args:
            name: Full name of the tensor.
            tensor: The tensor `[rows, ...]`, or its placeholder.
            numbers: `[n]` int64.

        Example:
            >>> from safetensors.torch import save_file
            >>> save_file({"weight": torch.eye(3)}, "model.safetensors")
            >>> layer = nn.Embedding(3, 3)
            >>> stored = StoredWeights({"layer.weight": Source(Path("model.safetensors"), "weight")})
            >>> stored.release("layer", layer)
            >>> stored.rows("layer.weight", layer.weight, torch.tensor([2, 0])).tolist()
            [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
        """
        if not self.is_absent(tensor):
            return tensor.detach()[numbers]
        source = self._sources[name]
        with safe_open(source.path, framework="pt") as file:
            found: Tensor = file.get_tensor(source.key)[numbers]
        return self._changed(source, found).to(tensor.dtype)

    def change(self, name: str, tensor: Tensor, change: Change) -> None:
        """Change a tensor of the model, now or whenever it is read from its file from now on."""
        if name in self._sources:
            self._changes.setdefault(self._sources[name], []).append(change)
        if not self.is_absent(tensor):
            tensor.data = change(tensor.detach())

    def read(self, name: str, module: nn.Module) -> dict[str, Tensor]:
        """Bring the tensors of a module into memory.

        Args:
            name: The module's dotted path from the model's root, "" for the model itself.
            module: The module.

        Returns:
            Those that were not there, by full name.
        """
        tensors = {id(tensor): (full, tensor) for full, tensor in _tensors(name, module).items()}  # each once
        absent = {full: tensor for full, tensor in tensors.values() if self.is_absent(tensor)}
        found = self._read(absent)
        for full, tensor in absent.items():
            tensor.data = found.pop(full).to(tensor.dtype)
        return absent

    def release(self, name: str, module: nn.Module) -> None:
        """Put placeholders in place of all tensors of a module that lie in a file."""
        self._release({full: tensor for full, tensor in _tensors(name, module).items() if full in self._sources})

    @contextmanager
    def held(self, name: str, module: nn.Module) -> Iterator[None]:
        """A module is in memory while the context is open; what was not there before is released."""
        absent = self.read(name, module)
        try:
            yield
        finally:
            self._release(absent)

    def wrote(self, sources: Mapping[str, Source]) -> None:
        """Note the files that now hold tensors of the model in their final form, so that they can be released."""
        self._sources |= sources

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors from their files, changed as they are to be."""
        found = read_tensors({name: self._sources[name] for name in names})
        return {name: self._changed(self._sources[name], tensor) for name, tensor in found.items()}

    def _changed(self, source: Source, tensor: Tensor) -> Tensor:
        for change in self._changes.get(source, ()):
            tensor = change(tensor)
        return tensor

    def _release(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not self.is_absent(tensor):
                made = self._placeholders.setdefault(
                    (name, tensor.dtype), placeholder(tuple(tensor.shape), tensor.dtype)
                )
                self._addresses.add(made.data_ptr())
                tensor.data = made


def _tensors(name: str, module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and persistent buffers themselves, by full name."""
    prefix = f"{name}." if name else ""
    return {f"{prefix}{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
