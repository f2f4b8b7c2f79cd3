import io
import json

import pytest
from rich.console import Console

from grkan.bench import report
from grkan.bench.contest import Measurement, Result
from grkan.bench.kernels import Stats

RESULT = Result(
    {"batch": 2, "pass": "training step"},
    "ViT",
    {"ViT": Measurement([0.5, 0.25, 0.5], 1), "KAT": Measurement([1.0, 0.5, 1.5], 4)},
    facts={"ViT": {"bytes kept": 4000}, "KAT": {"bytes kept": 3000}},
    traffic={"ViT": 0, "KAT": 0},
)
FORWARD = Stats(
    "sm_90", "forward", "bfloat16", "abs_of_sum", (5, 4), vector=8, registers=54, stack=0, load=128, store=64,
    atomics=1, barriers=2, instructions=18.5, with_ends=20.25, arithmetic=9.0, bytes=4.0, sums=0.0,
)  # fmt: skip


def rows(tables):
    """The cells of tables as they are printed, line by line; a title is one cell."""
    console = Console(file=io.StringIO(), width=300)
    for table in tables:
        console.print(table)
    lines = [line for line in console.file.getvalue().splitlines() if line[0] not in "┏┡└"]
    return [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]


def test_tables_of_a_contest():
    title, header, vit, kat, facts, *kept = rows(report.contest_tables(RESULT))
    assert title == ["batch 2, training step; ratios to ViT"]
    assert header[-6:] == ["median", "minimum", "ratio", "quartiles", "of minima", "images/s"]
    assert vit == ["ViT", "500 ms", "250 ms", "1.00", "1.00-1.00", "1.00", "4.0"]
    assert kat == ["KAT", "1.00 s", "500 ms", "2.00", "2.00-2.50", "2.00", "2.0"]
    assert facts[-1] == "bytes kept"
    assert kept == [["ViT", "4,000"], ["KAT", "3,000"]]


def test_a_contest_of_which_nothing_else_is_known_has_one_table():
    bare = Result(RESULT.job, "ViT", RESULT.measurements, {"ViT": {}, "KAT": {}}, {"ViT": 10**9, "KAT": 10**9})
    (table,) = report.contest_tables(bare)
    assert rows([table])[2][-2:] == ["4.0", "2.0"]  # images and 10^9 bytes a second


def test_json_of_a_contest():
    found = json.loads(json.dumps(report.contest_as_json(RESULT)))
    assert found["job"] == {"batch": 2, "pass": "training step"}
    assert found["baseline"] == "ViT"
    assert found["rivals"]["KAT"] == {
        "median": 1.0, "minimum": 0.5, "images per second": 2.0, "bytes kept": 3000, "seconds": [1.0, 0.5, 1.5],
        "calls": 4, "ratio": {"median": 2.0, "low": 2.0, "high": 2.5, "minima": 2.0},
    }  # fmt: skip


def test_tables_and_json_of_kernels():
    backward = Stats(**{**vars(FORWARD), "target": "gfx9", "kernel": "backward", "order": (7, 6)})
    title, _, first, title_2, _, second, others, *_ = rows(report.kernel_tables([FORWARD, backward]))
    assert title[0].startswith("sm_90; estimate for H100 SXM: 3.35 TB/s")
    cells = ["54", "0", "128/64", "1", "2", "18.5 (20.2)", "4.00"]
    assert first == ["forward", "bfloat16", "(5,4)", "abs_of_sum", *cells, "838, memory"]
    assert title_2 == ["gfx9"]
    assert second == ["backward", "bfloat16", "(7,6)", "abs_of_sum", *cells, ""]  # whose rates are not known
    assert others == ["others' kernels"]
    kernels = report.kernels_as_json([FORWARD, backward])["kernels"]
    assert kernels[0]["estimate"] == {"scalars per second": 3.35e12 / 4, "limit": "memory"}
    assert kernels[1]["estimate"] is None
    assert {name: kernels[0][name] for name in vars(FORWARD)} == vars(FORWARD)


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.234, "1.23 s"), (0.0124, "12.4 ms"), (5e-6, "5.00 µs"), (0.1, "100 ms")]
)
def test_times_have_a_unit(seconds, text):
    assert report.format_time(seconds) == text


@pytest.mark.parametrize(("ratio", "text"), [(0.7512, "0.751"), (1.0, "1.00"), (124.4, "124"), (1251.2, "1251")])
def test_ratios_have_three_digits(ratio, text):
    assert report.format_ratio(ratio) == text
