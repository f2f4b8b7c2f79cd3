"""Write files whole or not at all.

A file is written under another name in the same folder, flushed to the disk, and renamed. So an interruption, a full
disk or a power cut leaves either the old file or the new one. A symbolic link is kept, and its target is replaced.
"""

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

_TEMPORARY = ".grkan-{token}.tmp{suffix}"


def check_writable(path: str | os.PathLike[str] | None) -> None:
    """Check that a file can be written at `path`, before the work that produces its content.

    Args:
        path: the file; None: nothing is to be written.

    Raises:
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: the path is a folder.
        PermissionError: its folder cannot be written to.
        OSError: the path is a device or a pipe, which the file would replace.
    """
    if path is None:
        return
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise OSError(errno.EISDIR, "is a folder, not a file", str(path))
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "is a device or a pipe, not a file", str(path))
    if not target.parent.is_dir():
        raise OSError(errno.ENOENT, "there is no such folder", str(target.parent))
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, "the folder cannot be written to", str(target.parent))


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the block a temporary file to write, then replace `path` with it; if the block fails, delete it.

    The temporary file has the suffix of `path`, because some writers choose the format by it. The new file gets the
    mode of the file that it replaces, or else the mode from the umask.

    Raises:
        OSError: as for `check_writable`; or the file cannot be written. The error names `path`.
    """
    check_writable(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(_TEMPORARY.format(token=secrets.token_hex(8), suffix=target.suffix))
    before = target.stat().st_mode if target.exists() else None
    try:
        with naming(path, temporary):
            # An old file may be private, so only the owner may read its replacement until that is complete.
            file = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if before is None else 0o600)
            mode = stat.S_IMODE(os.fstat(file).st_mode if before is None else before)
            os.close(file)
            yield temporary
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, mode)  # safetensors makes files that only their owner can read
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _synchronise_folder(target.parent)


@contextlib.contextmanager
def replacing_files(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Do as `replacing`, for writers that put further files beside theirs, such as one with the weights.

    The block gets a path of the same name in a temporary folder. The files that it leaves there replace the files of
    the same names beside `path`, and `path` itself last.

    Raises:
        OSError: as for `replacing`.
    """
    check_writable(path)
    target = Path(os.path.realpath(path))
    with naming(path), _temporary_folder(target) as folder:
        yield folder / target.name
        usual = _usual_mode(folder)
        for written in sorted(folder.iterdir(), key=lambda file: file.name == target.name):
            place = target.with_name(written.name)
            with open(written, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(written, stat.S_IMODE(place.stat().st_mode if place.exists() else usual))
            os.replace(written, place)
    _synchronise_folder(target.parent)


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Check that a new folder can be made at `path`; an empty folder may exist there.

    Raises:
        FileExistsError: something else exists there.
        FileNotFoundError: its parent does not exist.
        PermissionError: its parent cannot be written to.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OSError(errno.EEXIST, "already exists and is not an empty folder; choose a new or empty one", str(path))
    check_writable(target / "file" if target.is_dir() else target)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the block a temporary folder to fill, then rename it to `path`; if the block fails, delete it.

    Raises:
        OSError: as for `check_new_folder`.
    """
    check_new_folder(path)
    target = Path(os.path.realpath(path))
    with naming(path), _temporary_folder(target) as folder:
        filled = folder / target.name
        filled.mkdir()
        yield filled
        os.replace(filled, target)
    _synchronise_folder(target.parent)


def _usual_mode(folder: Path) -> int:
    """Return the mode that the umask gives a new file."""
    probe = folder / "probe"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode


@contextlib.contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """Make a folder beside `target`, in the same file system, and delete it after the block."""
    folder = target.with_name(_TEMPORARY.format(token=secrets.token_hex(8), suffix=""))
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write bytes to a file as `replacing` does.

    Raises:
        OSError: as for `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], temporary: Path | None = None) -> Iterator[None]:
    """Put `path` into an OSError of the block that names no file (a full disk, for instance) or names `temporary`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and error.filename != str(temporary):
            raise
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed processes, in a folder and everything below it."""
    for temporary in list(folder.rglob(_TEMPORARY.format(token="*", suffix="*"))):
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _synchronise_folder(folder: Path) -> None:
    """Make the rename survive a power cut, too. Not every system can; the file exists in any case."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
