"""The operator once more, in Triton: a second implementation that shares neither code nor layout with the kernels.

It reads the canonical tensors, sums in float32, and runs in Triton's interpreter, on numpy: no GPU, no compiler.
"""

import os

# Triton reads it when it is imported: its own functions, such as tl.max, become interpreted or compiled then.
os.environ["TRITON_INTERPRET"] = "1"
