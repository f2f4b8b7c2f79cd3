"""Write the figures of benchmarks into a page: python benchmarks/tables.py docs/benchmarks.md FILE...

`grkan bench SUITE --json FILE` writes each FILE. Its tables replace the lines between `<!-- SUITE -->` and
`<!-- end -->` in the page, or with `--device cuda` those after `<!-- SUITE on a GPU -->`. The bars of all files from a
CPU replace those between `<!-- bars -->` and `<!-- end -->`.
"""

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bars
from grkan.bench.report import RATE_COLUMNS, format_ratio, format_time, job_title

COLUMNS = {"ops": "shape", "layers": "pass", "models": "pass", "deploy": "batch"}
"""The part of a contest's job whose values become columns; each combination of the other parts gets its own table."""


def tables(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield where a report was measured, then its tables, in Markdown."""
    machine = report.get("gpu") or f"{report['cores']} cores of an {report['processor']} ({report['vectors']})"
    torch, date = report["torch"].partition("+")[0], report["date"].partition("T")[0]
    yield f"Measured by `{report['command']}` on {machine}, torch {torch}, {date}."
    column = COLUMNS[report["suite"]]
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for contest in report["contests"]:
        title = job_title({key: value for key, value in contest["job"].items() if key != column})
        grouped.setdefault(title, []).append(contest)
    for title, contests in grouped.items():
        baseline = contests[0]["baseline"]
        yield f"{title}: the median time, and the ratio to {baseline} with its quartiles"
        heads = [job_title({column: contest["job"][column]}) for contest in contests]
        rivals = list(dict.fromkeys(name for contest in contests for name in contest["rivals"]))
        rows = [[name, *(_time(contest["rivals"].get(name)) for contest in contests)] for name in rivals]
        yield _table(["", *heads], rows)
        facts = _facts(contests[-1]["rivals"])
        if facts:
            yield _table(
                ["", *(f"{fact}, {heads[-1]}" for fact in facts)],
                [[name, *(column[name] for column in facts.values())] for name in rivals],
            )


def _time(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return ""
    ratio = {name: format_ratio(value) for name, value in measured["ratio"].items()}
    return f"{format_time(measured['median'])}, {ratio['median']} ({ratio['low']}-{ratio['high']})"


def _facts(rivals: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Return the figures of the rivals other than times, as text, by fact and rival."""
    facts: dict[str, dict[str, str]] = {}
    for name, measured in rivals.items():
        for fact, value in measured.items():
            if fact not in ("median", "minimum", "ratio", "seconds", "calls", *RATE_COLUMNS):
                facts.setdefault(fact, {})[name] = f"{value:,}" if isinstance(value, int) else f"{value:.2g}"
    return {fact: {name: column.get(name, "") for name in rivals} for fact, column in facts.items()}


def bars_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Return the bars of all reports in Markdown."""
    rows = [[verdict.what, verdict.limit, *verdict.result] for report in reports for verdict in bars.judge(report)]
    return _table(["", "bar", "figure", ""], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(line)} |".replace("|  |", "| |") for line in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]])


def replace(page: str, name: str, text: str) -> str:
    """Return the page with the text between the marks of that name."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"the page has no place for {name}: <!-- {name} --> ... <!-- end -->")
    return pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args(arguments)
    reports = [json.loads(file.read_text()) for file in args.files]
    page = args.page.read_text()
    for report in reports:
        if report["suite"] in COLUMNS:
            place = report["suite"] + (" on a GPU" if "gpu" in report else "")
            page = replace(page, place, "\n\n".join(tables(report)))
    if judged := [report for report in reports if "gpu" not in report]:
        page = replace(page, "bars", bars_table(judged))
    args.page.write_text(page)


if __name__ == "__main__":
    main()
