"""Passes that turn a canonical graph into a backend's form. The result still runs in ONNX Runtime, for checks."""
