"""From a quantized checkpoint to ONNX, and from ONNX to engines."""
