"""Low-rank reconstruction of the quantization error: shared expert, routed experts, router, stored factors."""
