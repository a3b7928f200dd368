"""QE-Edge: vision-language models in 4 bits on Jetson and desktop NVIDIA GPUs.

The public functions are imported when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qe_edge.system.lazy import lazy_names
from qe_edge.system.version import VERSION

if TYPE_CHECKING:
    from qe_edge.layers.linear import QELinear
    from qe_edge.models.videos import Video
    from qe_edge.quantization.quantizer import quantize
    from qe_edge.quantization.single_layer import quantize_linear
    from qe_edge.recipes.recipe import Recipe, make_recipe
    from qe_edge.runtime.pipeline import Pipeline
    from qe_edge.runtime.torch_layers import load_quantized
    from qe_edge.system.errors import QEError


__version__ = VERSION

# ONNX Runtime keeps a device id under ~/.cache and sends events to Microsoft unless this is set before it is imported;
# what the user has set wins
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "Pipeline",
    "QEError",
    "QELinear",
    "Recipe",
    "Video",
    "__version__",
    "load_quantized",
    "make_recipe",
    "quantize",
    "quantize_linear",
]

__getattr__ = lazy_names(__name__, {
    "Pipeline": "qe_edge.runtime.pipeline",
    "QEError": "qe_edge.system.errors",
    "QELinear": "qe_edge.layers.linear",
    "Recipe": "qe_edge.recipes.recipe",
    "Video": "qe_edge.models.videos",
    "load_quantized": "qe_edge.runtime.torch_layers",
    "make_recipe": "qe_edge.recipes.recipe",
    "quantize": "qe_edge.quantization.quantizer",
    "quantize_linear": "qe_edge.quantization.single_layer",
})  # fmt: skip
