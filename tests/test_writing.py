"""A file appears whole or not at all, in the place and with the mode that it is to have."""

import errno
import os
import resource
import subprocess
import sys
import threading

import pytest

from grkan.writing import (
    check_writable,
    naming,
    new_folder,
    remove_leftovers,
    replacing,
    replacing_files,
    write_bytes,
)


@pytest.fixture
def umask():
    """Sets the umask to what others than the owner may not do."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize("content", [b"", b"new"])
@pytest.mark.parametrize("old", [None, b"older and longer"])
def test_the_content(tmp_path, content, old):
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)
    write_bytes(str(path), content)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_as_long_as_can_be(tmp_path):
    path = tmp_path / ("x" * 251 + ".txt")
    write_bytes(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_sees_the_ending(tmp_path):
    with replacing(tmp_path / "picture.svg") as temporary:
        assert temporary.suffix == ".svg"
        assert temporary.parent == tmp_path


def test_the_mode_of_a_new_file_is_the_umasks(tmp_path, umask):
    write_bytes(tmp_path / "file", b"new")
    assert mode(tmp_path / "file") == 0o640


@pytest.mark.parametrize("old_mode", [0o600, 0o664, 0o755, 0o444])
def test_the_mode_of_an_old_file_is_kept(tmp_path, umask, old_mode):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(old_mode)
    with replacing(path) as temporary:
        assert mode(temporary) == 0o600  # nobody else may read what is being written
        temporary.write_bytes(b"new")
    assert mode(path) == old_mode
    assert path.read_bytes() == b"new"


def test_the_mode_does_not_depend_on_the_writer(tmp_path, umask):
    with replacing(tmp_path / "file") as temporary:
        temporary.unlink()
        temporary.write_bytes(b"made anew")
        temporary.chmod(0o600)
    assert mode(tmp_path / "file") == 0o640


@pytest.mark.parametrize("error", [OSError("the disk is full"), ValueError("writer"), KeyboardInterrupt("Ctrl-C")])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error, old):
    path = tmp_path / "file.bin"
    if old is not None:
        path.write_bytes(old)

    def fail():
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise error

    with pytest.raises(type(error), match=str(error)):
        fail()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if old is None else [old])


@pytest.mark.parametrize("failing", ["fsync", "chmod", "replace"])
def test_a_system_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match=r"input/output error: '.*/file\.bin'"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_and_folder_reach_the_disk_in_this_order(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (done.append(os.readlink(f"/proc/self/fd/{f}")), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("replace"), replace(*names)))
    write_bytes(tmp_path / "file", b"new")
    assert done[0].startswith(str(tmp_path) + "/.grkan-")
    assert done[1:] == ["replace", str(tmp_path)]


def test_a_folder_that_cannot_be_synchronised_does_not_matter(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_alone(f):
        if os.path.isdir(f"/proc/self/fd/{f}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(f)

    monkeypatch.setattr(os, "fsync", files_alone)
    write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / "file.bin"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/file\.bin'"):
            write_bytes(path, bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere") as caught, naming(tmp_path / "here"):
        (tmp_path / "elsewhere").read_bytes()
    assert caught.value.filename == str(tmp_path / "elsewhere")


def test_a_link_stays_one(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("old", "new"):
        (tmp_path / f"link to {name}").symlink_to(tmp_path / "data" / name)
    (tmp_path / "data" / "old").write_bytes(b"old")
    for name in ("old", "new"):
        write_bytes(tmp_path / f"link to {name}", b"content")
        assert (tmp_path / f"link to {name}").is_symlink()
        assert (tmp_path / "data" / name).read_bytes() == b"content"
    assert len(list(tmp_path.rglob("*"))) == 5


def test_threads_that_write_one_file(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([i]) * 10_000 for i in range(8)]
    threads = [threading.Thread(target=write_bytes, args=(path, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("function", [check_writable, lambda path: write_bytes(path, b"new")])
class TestPlacesThatAreRefused:
    def test_folder(self, tmp_path, function):
        with pytest.raises(IsADirectoryError, match=f"is a folder, not a file: '{tmp_path}'"):
            function(tmp_path)

    def test_no_folder(self, tmp_path, function):
        with pytest.raises(FileNotFoundError, match=r"there is no such folder: '.*/nowhere'"):
            function(tmp_path / "nowhere" / "file")

    def test_pipe(self, tmp_path, function):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(OSError, match=r"is a device or a pipe, not a file: '.*/pipe'"):
            function(tmp_path / "pipe")
        assert (tmp_path / "pipe").is_fifo()

    def test_device(self, tmp_path, function):
        (tmp_path / "link").symlink_to("/dev/null")
        for path in ("/dev/null", tmp_path / "link"):
            with pytest.raises(OSError, match="is a device or a pipe, not a file"):
                function(path)

    def test_a_folder_without_permission(self, tmp_path, monkeypatch, function):
        monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
        with pytest.raises(PermissionError, match=f"the folder cannot be written to: '{tmp_path}'"):
            function(tmp_path / "file")
        assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_fine(tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    for path in (None, tmp_path / "new", str(tmp_path / "old")):
        check_writable(path)
    assert (tmp_path / "old").read_bytes() == b"old"


def test_leftovers_of_a_killed_process(tmp_path):
    (tmp_path / "inner").mkdir()
    kept = [tmp_path / name for name in (".hidden", ".x.1.tmp", "file.tmp", "inner/.grkan-notes")]
    for path in kept:
        path.touch()
    code = """
import os, signal, sys
from pathlib import Path
from grkan.writing import replacing
with replacing(Path(sys.argv[1], "file")), replacing(Path(sys.argv[1], "inner/picture.png")):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert len(list(tmp_path.rglob(".grkan-*.tmp*"))) == 2
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.rglob("*")) == sorted([*kept, tmp_path / "inner"])


def test_several_files_take_their_places_together(tmp_path, umask):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    path.chmod(0o600)
    with replacing_files(path) as file:
        assert file.name == path.name
        file.write_bytes(b"new")
        file.with_name("model.onnx.data").write_bytes(b"data")
        file.with_name("model.onnx.data").chmod(0o600)
        assert path.read_bytes() == b"old"
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        "model.onnx": b"new",
        "model.onnx.data": b"data",
    }
    assert [mode(path), mode(tmp_path / "model.onnx.data")] == [0o600, 0o640]


def test_of_several_files_none_is_left_if_their_writer_fails(tmp_path):
    def fail():
        with replacing_files(tmp_path / "model.onnx") as file:
            file.write_bytes(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_appears_whole_or_not_at_all(tmp_path, exists):
    path = tmp_path / "folder"
    if exists:
        path.mkdir()

    def fail():
        with new_folder(path) as folder:
            (folder / "file").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == [path] * exists
    with new_folder(path) as folder:
        (folder / "file").write_text("whole")
    assert (path / "file").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileExistsError, match="already exists and is not an empty folder"), new_folder(path):
        pass
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "missing" / "folder"):
        pass


def test_leftovers_of_several_files_are_removed_too(tmp_path):
    kept = tmp_path / "file"
    kept.touch()
    left = tmp_path / ".grkan-0123456789abcdef.tmp"
    left.mkdir()
    (left / "model.onnx").touch()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]
