"""From the canonical QELinear tensors to the layout that the plugin's kernels read, and back.

Imports inside are relative: the tests import this folder as `prepack`, an installed qe_edge as `qe_edge.prepack`.
"""
