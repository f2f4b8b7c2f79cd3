"""The part of the build that pyproject.toml cannot express: the CPU kernel, where there are PyTorch and a compiler.

`pip install --no-build-isolation .` builds it. `pip install .` builds in an environment without PyTorch, and so
installs without it, and so does a machine whose compiler fails: the reference in plain PyTorch then computes.
"""

import sys

from setuptools import Extension, setup

# The oldest release whose stable ABI has what the kernel uses; later ones run the same binary.
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10


def kernel() -> list[Extension]:
    """The extension, or nothing."""
    if sys.platform == "win32":  # MSVC has no vector extensions
        return []
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        return []
    names = ("rational", "tile_portable", "tile_avx2", "tile_avx512")
    flags = ["-std=c++20", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]
    return [
        Extension(
            "grkan._C",
            [f"csrc/{name}.cpp" for name in names],
            depends=["csrc/plan.h", "csrc/tile.h"],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch_cpu", "c10"],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
            extra_compile_args=flags,
            extra_link_args=["-Wl,--strip-debug"] if sys.platform == "linux" else [],
            optional=True,
            py_limited_api=True,
            language="c++",
        )
    ]


setup(ext_modules=kernel(), options={"bdist_wheel": {"py_limited_api": "cp310"}})
