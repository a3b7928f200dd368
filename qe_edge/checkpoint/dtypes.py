"""The types of safetensors: how wide they are, and what torch and numpy call them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from qe_edge.system.lazy import lazy_module

if TYPE_CHECKING:
    import torch
else:
    torch = lazy_module("torch")


class Kind(NamedTuple):
    """One type of the format.

    Attributes:
        bits: Bits of one number.
        torch: torch's name; "" for types that we do not read as tensors.
        numpy: numpy's name of what holds the same bytes; "" likewise.
    """

    bits: int
    torch: str = ""
    numpy: str = ""


# Every type of the format. Those with a name in torch come first, in the order in which the safetensors library writes
# them, which keeps every tensor aligned.
KINDS = {
    "I64": Kind(64, "int64", "int64"),
    "F64": Kind(64, "float64", "float64"),
    "F32": Kind(32, "float32", "float32"),
    "I32": Kind(32, "int32", "int32"),
    "BF16": Kind(16, "bfloat16", "uint16"),  # the upper half of a float32
    "F16": Kind(16, "float16", "float16"),
    "I16": Kind(16, "int16", "int16"),
    "I8": Kind(8, "int8", "int8"),
    "U8": Kind(8, "uint8", "uint8"),
    "BOOL": Kind(8, "bool", "bool"),
    "U64": Kind(64),
    "C64": Kind(64),
    "U32": Kind(32),
    "U16": Kind(16),
    "F8_E8M0": Kind(8),
    "F8_E5M2": Kind(8),
    "F8_E5M2FNUZ": Kind(8),
    "F8_E4M3": Kind(8),
    "F8_E4M3FNUZ": Kind(8),
    "F6_E3M2": Kind(6),
    "F6_E2M3": Kind(6),
    "F4": Kind(4),
}


@lru_cache(maxsize=1)
def torch_dtypes() -> dict[str, torch.dtype]:
    """Torch's types by the names of safetensors, in the order in which the library writes them.

    Example:
        >>> torch_dtypes()["BF16"]
        torch.bfloat16
    """
    return {name: getattr(torch, kind.torch) for name, kind in KINDS.items() if kind.torch}
