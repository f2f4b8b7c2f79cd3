import pickle
import resource

import pytest
import torch

from grkan.train.checkpoint import MetricsLog, load_state, read_metrics, save_state


def test_state_round_trip(tmp_path):
    save_state(tmp_path / "s.pt", {"weights": {"a": torch.arange(3.0)}, "step": 4})
    state = load_state(tmp_path / "s.pt")
    assert torch.equal(state["weights"]["a"], torch.arange(3.0))
    assert state["step"] == 4


@pytest.mark.parametrize("keep", [0, 10, 500, -1])
def test_a_truncated_state_is_named(tmp_path, keep):
    path = tmp_path / "state.pt"
    save_state(path, {"weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"state\.pt is damaged"):
        load_state(path)


def test_a_foreign_state_is_named(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is no training state of this version"):
        load_state(tmp_path / "other.pt")


def test_a_state_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save({"format": Evil()}, tmp_path / "evil2.pt")
    for name in ("evil.pt", "evil2.pt"):
        with pytest.raises(ValueError, match="damaged or no training state"):
            load_state(tmp_path / name)
    assert not (tmp_path / "ran").exists()


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
        with pytest.raises(OSError, match=r"File too large: '.*/state\.pt'"):
            save_state(tmp_path / "state.pt", {"weights": torch.zeros(1000)})
        with pytest.raises(OSError, match=r"File too large: '.*/metrics\.jsonl'"):
            log.append({"text": "x" * 200})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_line_that_was_cut_is_left_out(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"st')
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}]
