"""Run the kernels on a real GPU through the driver API. Not yet run on hardware."""
