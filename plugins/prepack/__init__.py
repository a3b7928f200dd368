"""From the canonical QELinear tensors to the layout that the plugin's kernels read, and back."""
