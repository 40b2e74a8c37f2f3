"""The compiled part, which setup.cfg cannot state: one build for each width of vectors that processors have."""

import platform
from glob import glob

from setuptools import setup

FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
OPENMP = ["-fopenmp"] if platform.system() == "Linux" else []  # as PyTorch has it there
LEVELS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS |= {"x86_64_v3": ["-march=x86-64-v3"], "x86_64_v4": ["-march=x86-64-v4", "-mavx512vnni"]}


def extensions() -> list:
    """
    One for each level, for gcc and clang; what a compiler does not take is left out.

    Without any of them the library works, and is slower.
    """
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:  # an installation without build isolation
        return []
    if platform.system() == "Windows":
        return []
    return [
        Pybind11Extension(
            f"knnmoe_hf.native._{level}",
            [f"knnmoe_hf/native/{level}.cpp"],
            cxx_std=17,
            depends=sorted(glob("knnmoe_hf/native/*.hpp")),
            extra_compile_args=[*FLAGS, *OPENMP, *flags],
            extra_link_args=OPENMP,
            optional=True,
        )
        for level, flags in LEVELS.items()
    ]


setup(ext_modules=extensions())
