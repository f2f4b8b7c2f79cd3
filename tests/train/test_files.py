import pickle
from pathlib import Path

import numpy as np
import pytest

from grkan.train.data import ImageData
from grkan.train.files import ImageFile, Paths


def test_paths_are_a_sequence(tmp_path):
    names = ["a/0.png", "b/ü.png", "b/\udcff.png", "c.png"]
    paths = Paths(tmp_path, iter(names))
    assert list(paths) == [tmp_path / name for name in names]
    assert paths[-1] == paths[np.int64(3)] == tmp_path / "c.png"
    assert list(paths[1:3]) == list(paths)[1:3]
    assert list(pickle.loads(pickle.dumps(paths))) == list(paths)
    with pytest.raises(IndexError):
        paths[4]
    assert len(Paths(tmp_path, [])) == 0


@pytest.mark.parametrize("names", [["/x/ab/1.png", "/x/ac/2.png"], ["a.png", "b.png"], ["/a.png"], ["a/b.png"], []])
def test_a_list_of_paths_becomes_one(names):
    paths = [Path(name) for name in names]
    data = ImageData(paths, np.zeros(len(names), np.int64), ("a",))
    assert isinstance(data.images, Paths)
    assert list(data.images) == paths
    assert [data.name(i) for i in range(len(names))] == names


def test_a_million_paths_are_small():
    names = (f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(20_000))
    size = len(pickle.dumps(Paths(Path("/data"), names)))
    assert size * 64 < 60e6  # as much as in memory: 1.28 million


def test_a_file_in_memory_has_a_name():
    file = ImageFile(b"abc", "a.tar/x.png")
    assert (file.name, file.read()) == ("a.tar/x.png", b"abc")
