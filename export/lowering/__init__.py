"""Passes that turn a canonical graph into what a backend wants; the result still runs in ONNX Runtime for checking."""
