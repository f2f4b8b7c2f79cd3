"""One way to write a file: whole or not at all.

A file is made under another name in the same folder, flushed to the disk, and renamed. So an interruption, a full disk
or a power cut leaves either the old file or the new one. A symbolic link stays one, and what it points to is replaced.
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
    """Raise if no file can be written there, so that this is known before the work whose result it holds.

    Args:
        path: the file; None: there is none to write.

    Raises:
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: it is a folder.
        PermissionError: its folder cannot be written to.
        OSError: it is a device or a pipe, which the file would replace.
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
    """A file for the block to write, which then takes the place of `path`; nothing is left of it if the block fails.

    It has the ending of `path`, for writers that go by it. The new file has the mode of the one that it replaces, or
    else what the umask says.

    Raises:
        OSError: as for `check_writable`, or the file, which is named, cannot be written.
    """
    check_writable(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(_TEMPORARY.format(token=secrets.token_hex(8), suffix=target.suffix))
    before = target.stat().st_mode if target.exists() else None
    try:
        with naming(path, temporary):
            # Until it is whole, nobody may read it who might not read the old one.
            file = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if before is None else 0o600)
            mode = stat.S_IMODE(os.fstat(file).st_mode if before is None else before)
            os.close(file)
            yield temporary
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            os.chmod(temporary, mode)  # safetensors makes files for their owner alone
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    _synchronise_folder(target.parent)


@contextlib.contextmanager
def replacing_files(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `replacing`, for writers that put further files beside theirs, as that of the weights.

    The block gets a path of the same name in a folder of its own. What it leaves there takes the place of the files of
    these names, that of `path` last.

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
    """Raise if no folder can be made there: something is there already, but for an empty folder.

    Raises:
        FileExistsError, FileNotFoundError, PermissionError: that, or its parent is not there, or cannot be written to.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise OSError(errno.EEXIST, "is there already; a new or an empty folder is wanted", str(path))
    check_writable(target / "file" if target.is_dir() else target)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder for the block to fill, which then is `path`; nothing is left of it if the block fails.

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
    """Of a new file, as the umask has it."""
    probe = folder / "probe"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    return mode


@contextlib.contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside a file or folder, and in the same file system; gone after the block."""
    folder = target.with_name(_TEMPORARY.format(token=secrets.token_hex(8), suffix=""))
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """`replacing` for content that is at hand.

    Raises:
        OSError: as for `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], temporary: Path | None = None) -> Iterator[None]:
    """Name `path` in an OSError of the block that names no file, as that of a full disk, or names `temporary`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and error.filename != str(temporary):
            raise
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error


def remove_leftovers(folder: Path) -> None:
    """Delete, in a folder and all in it, the temporary files of processes that were killed while they wrote."""
    for temporary in list(folder.rglob(_TEMPORARY.format(token="*", suffix="*"))):
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _synchronise_folder(folder: Path) -> None:
    """Make the rename, too, survive a power cut. Not every system can, and the file is there in any case."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
