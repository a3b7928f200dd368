"""Quantization methods, one file each.

A method turns one linear problem (weights plus statistics of its calibration input) into a `QuantizedLinear`. Adding
one is a file with a `Method` subclass and a line in `METHODS`, or an entry point of the group `qe_edge.methods` in a
package of its own.
"""

from __future__ import annotations

from typing import Any

from qe_edge.methods.base import Method, MethodOptions
from qe_edge.reconstruction.problem import LinearProblem
from qe_edge.system.registry import Registry

METHODS: Registry[type[Method[Any]]] = Registry(
    "method",
    {
        "rtn": "qe_edge.methods.rtn:RoundToNearest",
        "smoothquant": "qe_edge.methods.smoothquant:SmoothQuant",
        "masquant": "qe_edge.methods.masquant:MASQuant",
        "awq": "qe_edge.methods.awq:AWQ",
        "mbq": "qe_edge.methods.mbq:MBQ",
        "gptq": "qe_edge.methods.gptq:GPTQ",
        "vlmq": "qe_edge.methods.vlmq:VLMQ",
        "loaq": "qe_edge.methods.loaq:LoaQ",
        "aespa": "qe_edge.methods.aespa:Aespa",
        "obq": "qe_edge.methods.obq:OBQ",
        "quarot": "qe_edge.methods.quarot:QuaRot",
        "quip": "qe_edge.methods.quip:QuIP",
        "quipsharp": "qe_edge.methods.quipsharp:QuIPSharp",
        "qbb": "qe_edge.methods.qbb:QBB",
        "bwa": "qe_edge.methods.bwa:BWA",
        "spqr": "qe_edge.methods.spqr:SpQR",
        "atom": "qe_edge.methods.atom:Atom",
        "omniquant": "qe_edge.methods.omniquant:OmniQuant",
        "autoround": "qe_edge.methods.autoround:AutoRound",
        "lsq": "qe_edge.methods.lsq:LSQ",
        "llmqat": "qe_edge.methods.llmqat:LLMQAT",
        "dlqat": "qe_edge.methods.dlqat:DLQAT",
        "lorc": "qe_edge.methods.lorc:LoRC",
        "lqer": "qe_edge.methods.lqer:LQER",
        "svdquant": "qe_edge.methods.svdquant:SVDQuant",
        "aser": "qe_edge.methods.aser:ASER",
        "serq": "qe_edge.methods.serq:SERQ",
        "qe": "qe_edge.methods.qe:QuantExperts",
    },
    group="qe_edge.methods",
    base=Method,
)

__all__ = ["METHODS", "LinearProblem", "Method", "MethodOptions"]
