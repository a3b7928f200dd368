"""Tests of the kernels, the plan, the prepack and the plugin; none of them needs a GPU."""
