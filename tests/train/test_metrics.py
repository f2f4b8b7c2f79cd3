import resource

import pytest

from grkan.train.metrics import MetricsLog, Running, read_metrics


def test_means_are_those_of_the_images():
    running = Running(seconds=2.0)
    running.add(loss=3.0, correct=1, images=2)
    running.add(loss=5.0, correct=2, images=2)
    assert running.means() == {"train_loss": 2.0, "train_top1": 75.0, "images_per_second": 2.0}
    running.add(loss=0.0, correct=None, images=4)  # mixed labels
    assert running.means() == {"train_loss": 1.0, "images_per_second": 4.0}


def test_metrics_are_cut_back_to_where_the_state_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"step": 1})
    size = log.size()
    log.append({"step": 2})
    log = MetricsLog(path, size)
    log.append({"step": 20})
    assert read_metrics(path) == [{"step": 1}, {"step": 20}]


@pytest.mark.parametrize("content", [b"", b'{"step": 1}\n', b'{"step": 1}\n{"st'])
def test_metrics_that_have_lost_lines_are_not_filled_up(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    MetricsLog(path, size=1000).append({"step": 3})
    assert path.read_bytes() == content[: content.rfind(b"\n") + 1] + b'{"step": 3}\n'


def test_metrics_are_json(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append({"loss": float("nan")})
    assert log.size() == 0


def test_a_full_disk_names_the_file(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/metrics\.jsonl'"):
            log.append({"text": "x" * 200})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("rest", [b'{"st', b"\xff\n", b"5\n"])
def test_a_line_that_is_damaged_is_left_out_and_what_follows(rest, tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1}\n' + rest)
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}]
