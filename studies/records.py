"""The results of a study: a file with one line of JSON for each finished run."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from grkan.writing import write_bytes

Run = TypeVar("Run")


def read(results: Path, kind: type[Run]) -> dict[Run, dict[str, Any]]:
    """Return the results of all finished runs. `kind`: the dataclass of a run; every result has its fields."""
    lines = results.read_text().splitlines() if results.exists() else []
    found = [json.loads(line) for line in lines]
    return {kind(**{field.name: result[field.name] for field in fields(kind)}): result for result in found}


def add(result: Mapping[str, Any], results: Path) -> None:
    """Add the result of a run to the file, completely or not at all."""
    before = results.read_bytes() if results.exists() else b""
    write_bytes(results, before + json.dumps(result).encode() + b"\n")
