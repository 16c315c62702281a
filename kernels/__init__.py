"""The operations of DPT that are worth a CUDA kernel, each one source that runs on a GPU and, emulated, on the host.

One file per concept of the paper: `fusion.cu` holds the kernels, `fusion.py` the functions that call them. They take NumPy
arrays (the host) or CuPy arrays (the GPU). Importing this package imports nothing else: NumPy, ml_dtypes and CuPy are
imported by the modules that use them.
"""

from __future__ import annotations

__version__ = "0.1.0"
