"""A folder for timm and the Hub: weights, the configuration that timm builds the model from, and a model card."""

import json
from pathlib import Path
from typing import Any, TypedDict

import timm
import torch
from timm.models import save_for_hf
from torch import nn

from .._version import __version__
from ..errors import GrkanRuntimeError, GrkanValueError
from ..models.metadata import ModelMetadata, describe_model
from ..nn import GroupRational
from ..nn.wrappers import unwrap
from ..rational.arguments import check_module
from ..writing import new_folder

_SETTINGS = "train.yaml"


_CARD = """---
tags:
- image-classification
- timm
- grkan
pipeline_tag: image-classification
library_name: timm
---

# {name}

{origin}

{facts}

## Use

```
pip install "grkan[models]"
```

```python
import grkan  # timm then knows the model
import timm

model = timm.create_model("hf-hub:USER/{name}", pretrained=True).eval()  # or local-dir:FOLDER
```
"""

_CONVERTED = """
What was converted, and how, is in `conversion.json`: `grkan.apply_conversion_(model, recipe)` repeats it.
"""

_RESULTS = """
## Results

On the test images of {data}, after {epoch} of {epochs} epochs:

| top-1 | loss |
|---|---|
| {top1:.2f} % | {loss:.4f} |

The command, with the settings in `{file}`:

```
grkan train --config {file} --output run
```
"""


class Results(TypedDict):
    """The results of a training run, at the epoch whose weights were kept."""

    data: str
    epoch: int
    epochs: int
    top1: float
    loss: float
    settings: str
    """The settings in YAML, for `grkan train --config`."""


def write_timm(model: Any, path: Path) -> None:
    """Write the folder.

    Args:
        model: a model of timm's registry, or converted from one. Its attribute `grkan_results`, of the type `Results`,
            goes into the card. Models that `grkan export` loads from a run's folder have it.
        path: the folder, new or empty.

    Raises:
        RuntimeError: timm does not build the same model from the folder.
    """
    original = unwrap(check_module("model", model))
    if getattr(original, "pretrained_cfg", None) is None:
        raise GrkanValueError(f"model must be in timm's registry for format 'timm'; got a {type(original).__name__}")
    record = describe_model(original, None, None, None)
    results: Results | None = getattr(original, "grkan_results", None)
    with new_folder(path) as folder:
        save_for_hf(
            original,
            str(folder),
            model_config={"label_names": record["classes"]} if record["classes"] else None,
            model_args=record["arguments"],
            data_config=record["preprocessing"],
            safe_serialization=True,
        )
        if record["conversion"] is not None:
            (folder / "conversion.json").write_text(json.dumps(record["conversion"], indent=1) + "\n", "utf-8")
        if results is not None:
            (folder / _SETTINGS).write_text(results["settings"], "utf-8")
        (folder / "README.md").write_text(_card(original, path.name, record, results), "utf-8")
        _check(original, folder)


def _card(model: nn.Module, name: str, record: ModelMetadata, results: Results | None) -> str:
    facts = [f"parameters: {sum(p.numel() for p in model.parameters()):,}"]
    if size := (record["preprocessing"] or {}).get("input_size"):
        facts.append(f"input: {' x '.join(map(str, size))}")
    if record["classes"]:
        facts.append(f"classes: {len(record['classes'])}")
    acts = [module for module in model.modules() if isinstance(module, GroupRational)]
    card = _CARD.format(name=name, origin=_origin(record, acts), facts="\n".join(f"- {fact}" for fact in facts))
    if record["conversion"] is not None:
        card += _CONVERTED
    if results is not None:
        card += _RESULTS.format(**results, file=_SETTINGS)
    return f"{card}\nWritten by grkan {__version__} with timm {timm.__version__} and PyTorch {torch.__version__}.\n"


def _origin(record: ModelMetadata, acts: list[GroupRational]) -> str:
    orders = " and ".join(sorted({f"({act.order[0]}, {act.order[1]})" for act in acts}))
    kinds = f"{len(acts)} group-wise rational functions of order {orders}" if acts else "no rational functions"
    if record["conversion"] is not None:
        return f"A `{record['model']}` of timm, converted to a Kolmogorov-Arnold Transformer: it has {kinds}."
    return f"A `{record['model']}`, a Kolmogorov-Arnold Transformer (arXiv 2409.10594) with {kinds}."


@torch.no_grad()
def _check(model: nn.Module, folder: Path) -> None:
    """Check that timm builds a model with the same weights from the folder; these include form, groups and order."""
    made = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    state, wanted = made.state_dict(), model.state_dict()
    different = [name for name, t in wanted.items() if name not in state or not torch.equal(state[name], t.cpu())]
    if different or len(state) != len(wanted):
        raise GrkanRuntimeError(
            f"timm {timm.__version__} builds a different model from the folder: "
            f"{(different or sorted(state.keys() - wanted.keys()))[0]} differs; nothing was written"
        )
