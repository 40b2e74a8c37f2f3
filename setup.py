"""The native extensions, which setup.cfg cannot describe: one build for each SIMD level of processors."""

import platform
from glob import glob

from setuptools import setup

FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
OPENMP = ["-fopenmp"] if platform.system() == "Linux" else []  # where PyTorch uses the same OpenMP runtime
BUILDS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    BUILDS["x86_64_v3"] = ["-march=x86-64-v3"]  # AVX2, FMA, F16C


def extensions() -> list:
    """
    One extension for each build, for gcc and clang; a build that the compiler does not support is left out.

    The library works without any of them, but its lookups on a CPU are slower.
    """
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:  # an installation without build isolation
        return []
    if platform.system() == "Windows":
        return []
    return [
        Pybind11Extension(
            f"knnmoe_hf.native._{build}",
            [f"knnmoe_hf/native/{build}.cpp"],
            cxx_std=17,
            depends=sorted(glob("knnmoe_hf/native/*.hpp")),
            extra_compile_args=[*FLAGS, *OPENMP, *flags],
            extra_link_args=OPENMP,
            optional=True,
        )
        for build, flags in BUILDS.items()
    ]


setup(ext_modules=extensions())
