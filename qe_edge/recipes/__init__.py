"""The recipe: every choice that determines a quantized checkpoint, and how it is read."""
