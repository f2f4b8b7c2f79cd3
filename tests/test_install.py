"""Wheels: with the kernel where there is a compiler, without it elsewhere, and always one that installs."""

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

SOURCE = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (SOURCE / "setup.py").exists(), reason="this is no source tree")

# Writes what it is asked for: tags and contents of a wheel do not depend on what stands in the library.
FAKE = """#!/bin/sh
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then echo library > "$2"; fi
    shift
done
"""
# Without optimisation, which takes nine tenths of the time.
QUICK = """#!/bin/sh
exec c++ "$@" -O0
"""


def compiler(tmp_path, script):
    path = tmp_path / "compiler"
    path.write_text(script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def build(tmp_path, compiler):
    """Build a wheel of a copy of the source without PyTorch; its name, the kernel's files in it, and what was said."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("csrc", "src"):
        shutil.copytree(
            SOURCE / name, source / name, ignore=shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(SOURCE / name, source)
    program = (
        "import sys; sys.modules['torch'] = None; sys.argv[1:] = ['bdist_wheel', '--dist-dir', sys.argv[1]]\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'))"
    )
    environment = {
        **os.environ,
        "CC": compiler,
        "CXX": compiler,
        "LDSHARED": f"{compiler} -shared",
        "LDCXXSHARED": f"{compiler} -shared",
    }
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "dist")],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        metadata = files.read(next(name for name in names if name.endswith("/WHEEL"))).decode()
    assert "grkan/__init__.py" in names
    return wheel, metadata, [name for name in names if name.endswith((".so", ".pyd", ".dylib"))], result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="the kernel needs GCC or Clang")
def test_with_a_compiler_the_wheel_is_for_this_platform_and_every_python(tmp_path):
    wheel, metadata, libraries, said = build(tmp_path, compiler(tmp_path, FAKE))
    assert libraries == ["grkan/libgrkan.so"]
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert "Root-Is-Purelib: false" in metadata
    assert "WITHOUT" not in said


def test_without_a_compiler_the_wheel_is_for_any_platform_and_says_so(tmp_path):
    wheel, metadata, libraries, said = build(tmp_path, str(tmp_path / "missing"))
    assert libraries == []
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "Root-Is-Purelib: true" in metadata
    assert "grkan is built WITHOUT its CPU kernel" in said


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler")
def test_the_built_library_has_two_doors(tmp_path):
    """The real one, compiled: without PyTorch's headers, and linked with none of its libraries."""
    wheel, _, libraries, _ = build(tmp_path, compiler(tmp_path, QUICK))
    with zipfile.ZipFile(wheel) as files:
        library = files.extract(libraries[0], tmp_path)
    program = "import ctypes, sys; it = ctypes.CDLL(sys.argv[1]); print(it.grkan_interface()); it.RegisterCustomOps"
    result = subprocess.run([sys.executable, "-c", program, library], capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"
