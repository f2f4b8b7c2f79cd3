"""One way to write a file: whole or not at all.

A file is made under another name in the same folder, flushed to the disk, and renamed. So an interruption, a full disk
or a power cut leaves either the old file or the new one. A symbolic link stays one, and what it points to is replaced.
"""

import contextlib
import errno
import os
import secrets
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
    for temporary in folder.rglob(_TEMPORARY.format(token="*", suffix="*")):
        temporary.unlink()


def _synchronise_folder(folder: Path) -> None:
    """Make the rename, too, survive a power cut. Not every system can, and the file is there in any case."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
