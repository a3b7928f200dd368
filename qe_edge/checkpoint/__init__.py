"""Files of a quantized checkpoint: safetensors, layers, hashes; nothing here knows a model."""
