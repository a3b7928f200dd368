"""The quantized linear layer, and which numbers it can hold."""
