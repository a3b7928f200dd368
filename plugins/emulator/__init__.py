"""Two ways to run the kernels on a CPU: their source (simt.h) and the PTX that ships (ptx.py). README.md says more."""
