"""The part of the build that pyproject.toml cannot express: the CPU kernel, wherever there is a C++ compiler.

The kernel is a shared library with a C interface. It is no module of Python's and knows nothing of PyTorch, so one
wheel serves every version of both. Where no compiler works the wheel is one for any platform, and grkan computes by
plain PyTorch operations.
"""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

SOURCES = [
    f"csrc/{name}.cpp" for name in ("grkan", "onnxruntime", "rational", "tile_portable", "tile_avx2", "tile_avx512")
]
HEADERS = [f"csrc/{name}.h" for name in ("grkan", "rational", "plan", "tile")]
FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi"]

LIBRARY = Extension(
    "grkan.libgrkan",
    SOURCES,
    depends=HEADERS,
    extra_compile_args=FLAGS,
    extra_link_args=["-Wl,--strip-debug"] if sys.platform == "linux" else [],
    optional=True,
    language="c++",
)


class BuildLibrary(build_ext):
    """Builds a library as if it were an extension module, but for its name and what it is linked with."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def get_libraries(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (BaseError, CCompilerError) as error:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # that of an earlier build
            self.warn(
                "grkan is built WITHOUT its CPU kernel, so it will compute by plain PyTorch operations, some ten times "
                f"slower: no C++ compiler works here ({error})"
            )


class Wheel(bdist_wheel):
    """A wheel for every Python: of this platform with the library, of any platform without it."""

    def run(self) -> None:
        self.run_command("build_ext")
        if not all(Path(output).exists() for output in self.get_finalized_command("build_ext").get_outputs()):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[] if sys.platform == "win32" else [LIBRARY],  # MSVC has no vector extensions
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
)
