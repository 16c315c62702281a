"""Build the Cython twins of `reference/nn/*.pyx`; all metadata is in pyproject.toml.

They need a C compiler, and no NumPy headers. A compiler that is missing or fails stops the installation with its own message:
an installation that quietly left the twins out would be many times slower without a reason anyone could see.
In a checkout: `python setup.py build_ext --inplace`.
"""

import os
import tempfile
from glob import glob
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

# No -march=native, so that a wheel runs on any machine (reference/nn/vectorised.pxd says how it still uses each machine's
# instructions); no -ffast-math, so that NaN, infinity and rounding stay IEEE's.
OPTIMISE = ["-O3"]
OPENMP = "-fopenmp"


class BuildTwins(build_ext):
    """Compile with OpenMP, and say so where the compiler has none: the twins then compute the same on one thread."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.parallel = os.cpu_count()  # compilers at once

    def build_extensions(self) -> None:
        if self.has_openmp():
            for extension in self.extensions:
                extension.extra_compile_args.append(OPENMP)
                extension.extra_link_args.append(OPENMP)
        else:
            self.warn(f"the compiler does not know {OPENMP}: the twins will run on one thread")
        super().build_extensions()

    def has_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n")
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=[OPENMP])
                self.compiler.link_executable(objects, str(Path(folder, "probe")), extra_postargs=[OPENMP])
            except (CompileError, LinkError):
                return False
        return True


setup(
    cmdclass={"build_ext": BuildTwins},
    ext_modules=cythonize(
        [
            Extension(path.removesuffix(".pyx").replace("/", "."), [path], extra_compile_args=[*OPTIMISE])
            for path in sorted(glob("reference/nn/*.pyx"))
        ],
        language_level=3,
    ),
)
