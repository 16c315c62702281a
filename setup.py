"""Build the Cython twins of `reference/nn/*.pyx`; all metadata is in pyproject.toml.

They need a C compiler, and no NumPy headers. A compiler that is missing or fails stops the installation with its own message:
an installation that quietly left the twins out would be many times slower without a reason anyone could see.
In a checkout: `python setup.py build_ext --inplace`.
"""

from glob import glob

from Cython.Build import cythonize
from setuptools import Extension, setup

# No -march=native, so that a wheel runs on any machine; no -ffast-math, so that NaN, infinity and rounding stay IEEE's.
setup(
    ext_modules=cythonize(
        [
            Extension(path.removesuffix(".pyx").replace("/", "."), [path], extra_compile_args=["-O3"])
            for path in sorted(glob("reference/nn/*.pyx"))
        ],
        language_level=3,
    )
)
