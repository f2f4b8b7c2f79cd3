"""Compare GR-KANs with other MLPs in a language model: the study of docs/language.md, from text to table and pictures.

    python studies/language.py --output runs/language --jobs 2     start or resume
    python studies/language.py --output runs/language --plan       show the remaining runs and their time
    python studies/language.py --output runs/language --report docs/language.md

The text comes from three Debian packages, which `apt-get download` fetches. Every run saves its state every two
minutes, so the study can be stopped at any moment. Every result is a line of one file: OUTPUT/results.jsonl, or what
`--results` names. The results behind docs/language.md are in studies/language.jsonl.
"""

import argparse
import fcntl
import gzip
import hashlib
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # the tokenizer's threads

import numpy as np
import records
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

import grkan
from grkan.errors import first_of
from grkan.train.interruption import when_starter_ends
from grkan.writing import remove_leftovers, replacing, write_bytes

PACKAGES = ("dict-gcide", "linux-doc-6.1", "python3.11-doc")
END = "<|end|>"
WIDTH, LAYERS, HEADS = 128, 4, 4
HIDDEN = 512  # of an MLP without a gate
GATED = 344  # 2/3 of HIDDEN, rounded to a multiple of 8: 0.4 % more parameters in the whole model
FEWER = 464  # as many operations as GELU's MLP of 512, by the paper's count of 21 per scalar for order (5, 4)
WEIGHT_DECAY = 0.1
RATES = (6e-3, 3e-3, 1.2e-2)  # 1.5e-3 was worst for all main rows


@dataclass(frozen=True)
class Settings:
    """The settings that all runs share."""

    vocabulary: int = 2048
    context: int = 256
    batch: int = 8
    tokens: int = 2_000_000
    long: int = 8_000_000
    validation_windows: int = 512
    curve_windows: int = 32
    curve_points: int = 20
    held_out: int = 50  # one document in this many
    main_seeds: int = 5
    other_seeds: int = 3  # of the other rows, and of the main rows at the long length
    checkpoint_seconds: float = 120.0


# --- Text ---------------------------------------------------------------------------------------------------------


def read_documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for every document of the packages unpacked under a folder."""
    docs = folder / "usr/share/doc"
    for path in sorted((docs / "linux-doc-6.1/Documentation").rglob("*.gz")):
        if path.name.endswith((".rst.gz", ".txt.gz")) and "translations" not in path.parts and not path.is_symlink():
            yield str(path.relative_to(docs)), gzip.decompress(path.read_bytes()).decode(errors="replace")
    for path in sorted((docs / "python3.11/html/_sources").rglob("*.rst.txt")):
        yield str(path.relative_to(docs)), path.read_text(errors="replace")
    # The dictionary is one file; each document is about 64 kB of consecutive entries.
    words = gzip.decompress((folder / "usr/share/dictd/gcide.dict.dz").read_bytes()).decode(errors="replace")
    entries = re.split(r"\n(?=\S)", words)
    part: list[str] = []
    size = number = 0
    for entry in [*entries, None]:
        if entry is None or size > 2**16:
            yield f"dict-gcide/{number}", "\n".join(part)
            part, size, number = [], 0, number + 1
        if entry is not None:
            part.append(entry)
            size += len(entry)


def fetch(folder: Path) -> None:
    """Download and unpack the packages."""
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob("*.deb")):
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)


def is_held_out(name: str, one_of: int) -> bool:
    """Whether a document is for validation only. This depends only on its name, not on the other documents."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % one_of == 0


def prepare(documents: Callable[[], Iterator[tuple[str, str]]], output: Path, settings: Settings) -> None:
    """Train the tokenizer on the training documents, and write tokenizer.json, train.npy, validation.npy, text.json."""
    if (output / "text.json").exists():
        return
    held = settings.held_out
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        (text for name, text in documents() if not is_held_out(name, held)),
        vocab_size=settings.vocabulary,
        special_tokens=[END],
        show_progress=False,
    )
    with replacing(output / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    end = tokenizer.token_to_id(END)
    parts: dict[bool, list[Any]] = {False: [], True: []}
    counts = {False: [0, 0, 0], True: [0, 0, 0]}
    for name, text in documents():
        where = is_held_out(name, held)
        parts[where].append(np.array([*tokenizer.encode(text).ids, end], dtype=np.uint16))
        for i, n in enumerate((1, len(text.encode()), len(text.split()))):
            counts[where][i] += n
    about: dict[str, Any] = {}
    digest = hashlib.sha256()
    for where, file in ((False, "train"), (True, "validation")):
        tokens = np.concatenate(parts[where])
        digest.update(tokens.tobytes())
        with replacing(output / f"{file}.npy") as temporary:
            np.save(temporary, tokens)
        about[file] = dict(zip(("documents", "bytes", "words"), counts[where], strict=True), tokens=len(tokens))
    about["digest"] = digest.hexdigest()[:16]
    write_bytes(output / "text.json", json.dumps(about, indent=2).encode())


class Text:
    """The tokens of a folder that `prepare` wrote."""

    def __init__(self, output: Path, settings: Settings) -> None:
        self.context, self.batch = settings.context, settings.batch
        self.digest: str = json.loads((output / "text.json").read_text())["digest"]
        self.train = np.load(output / "train.npy", mmap_mode="r")
        validation = torch.from_numpy(np.load(output / "validation.npy").astype(np.int64))
        count = min(settings.validation_windows, (len(validation) - 1) // self.context)
        starts = torch.linspace(0, len(validation) - 1 - self.context, count).long()
        self.windows = torch.stack([validation[s : s + self.context + 1] for s in starts.tolist()])
        tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
        # In a byte-level BPE, every character of a token stands for a byte; the end of a document counts as one byte.
        lengths = [
            1 if token == END else len(token) for token in map(tokenizer.id_to_token, range(settings.vocabulary))
        ]
        self.bytes = torch.tensor(lengths)

    def draw(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of a step, the same for all rows."""
        generator = np.random.default_rng((seed, step))
        starts = generator.integers(0, len(self.train) - self.context - 1, self.batch)
        windows = np.stack([self.train[s : s + self.context + 1] for s in starts]).astype(np.int64)
        tokens = torch.from_numpy(windows)
        return tokens[:, :-1], tokens[:, 1:]

    @torch.no_grad()
    def bits_per_byte(self, model: nn.Module, windows: int | None = None) -> float:
        """Return the bits per byte on all held-out windows, or on `windows` of them, evenly spaced."""
        chosen = self.windows
        if windows is not None:
            chosen = chosen[:: max(1, len(chosen) // windows)]
        loss, size = 0.0, 0
        for part in chosen.split(16):
            targets = part[:, 1:]
            loss += float(F.cross_entropy(model(part[:, :-1]).flatten(0, 1), targets.flatten(), reduction="sum"))
            size += int(self.bytes[targets].sum())
        return loss / math.log(2) / size


# --- Rows ---------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """up -> activation (times gate) -> down, initialised to preserve the variance, as `grkan.GRKAN` is."""

    def __init__(self, activation: nn.Module, hidden: int, gated: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden, bias=False), nn.Linear(hidden, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, hidden, bias=False) if gated else None
        self.activation = activation
        z = torch.randn(2, 4096, hidden, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            power = (activation(z[0]) * (z[1] if gated else 1.0)).square().mean()
        for linear in (self.up, self.gate):
            if linear is not None:
                nn.init.normal_(linear.weight, std=WIDTH**-0.5)
        nn.init.normal_(self.down.weight, std=float(power * hidden) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.up(x))
        return self.down(y if self.gate is None else y * self.gate(x))


class SquaredReLU(nn.Module):
    """arXiv 2109.08668."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class PolyNorm(nn.Module):
    """arXiv 2411.03884, Eq. 4: the first three powers, each normalised over the channels, weighted and added."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((3,), 1 / 3)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        powers = (F.rms_norm(p, x.shape[-1:], eps=1e-6) for p in (x, x * x, x * x * x))
        return sum((w * p for w, p in zip(self.weight, powers, strict=True)), self.bias)


class XIELU(nn.Module):
    """arXiv 2411.13010: quadratic above zero, an integrated ELU below, with two learned factors."""

    def __init__(self) -> None:
        super().__init__()
        self.positive = nn.Parameter(torch.tensor([math.log(math.expm1(0.8))]))
        self.negative = nn.Parameter(torch.tensor([math.log(math.expm1(0.3))]))

    def forward(self, x: Tensor) -> Tensor:
        above = F.softplus(self.positive) * x * x
        below = (torch.expm1(x.clamp(max=-1e-6)) - x) * (0.5 + F.softplus(self.negative))
        return torch.where(x > 0, above, below) + 0.5 * x


NORM = partial(nn.RMSNorm, elementwise_affine=False)  # as PolyNorm has it: without weights
FUNCTIONS = (PolyNorm, XIELU, grkan.GroupRational)  # those with parameters
SHOWN = ("grkan8", "grkan8-norm", "grkan1", "gate")  # the rows whose learned functions the picture has


def gr_kan(hidden: int = HIDDEN, frozen: bool = False, **arguments: Any) -> nn.Module:
    layer = grkan.GRKAN(WIDTH, hidden, bias=False, **arguments)
    if frozen:
        for act in (layer.act1, layer.act2):
            act.requires_grad_(False)
    return layer


def as_published() -> nn.Module:
    """The start in the study of June 2026 (see docs/language.md): a polynomial, and a denominator that stays 1."""
    x = np.linspace(-4.0, 4.0, 2000)
    polynomial = np.polynomial.polynomial.polyfit(x, x / (1 + np.exp(-x)), 5).tolist()
    layer = grkan.GRKAN(
        WIDTH,
        HIDDEN,
        bias=False,
        act_init=("identity", (polynomial, [0.0] * 4)),
        share_numerator=True,
        weight_init="trunc_normal",
    )
    for act in (layer.act1, layer.act2):
        act.denominator.requires_grad_(False)
    return layer


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    title: str
    mlp: Callable[[], nn.Module]
    operations: int
    """Operations of an MLP per token, as the paper counts them: multiply-adds, and 2m + 2n + 3 per scalar through F."""
    main: bool = False
    tuned_as: str | None = None
    """The row whose learning rate this row uses."""
    decayed: bool = False
    """Whether weight decay applies to the coefficients."""
    clipped_together: bool = False
    """Whether weights and coefficients share one gradient norm when they are clipped, as in most trainers."""
    coefficient_rate: float = 1.0
    """The learning rate of the coefficients, as a multiple of that of all other parameters."""


def _operations(hidden: int, matrices: int = 2, rational: int = 0, per_scalar: int = 21) -> int:
    return matrices * WIDTH * hidden + (hidden if matrices == 3 else 0) + rational * per_scalar


ROWS = {
    "gelu": Row("GELU", lambda: MLP(nn.GELU(), HIDDEN), _operations(HIDDEN), main=True),
    "swiglu": Row("SwiGLU", lambda: MLP(nn.SiLU(), GATED, gated=True), _operations(GATED, 3), main=True),
    "grkan8": Row("GR-KAN, 8 groups", gr_kan, _operations(HIDDEN, 2, WIDTH + HIDDEN), main=True),
    "grkan8-norm": Row(
        "GR-KAN, 8 groups, its hidden channels normalised", lambda: gr_kan(norm_layer=NORM),
        _operations(HIDDEN, 2, WIDTH + HIDDEN), main=True,
    ),
    "polynorm": Row("PolyNorm", lambda: MLP(PolyNorm(), HIDDEN), _operations(HIDDEN), main=True),
    "grkan1": Row(
        "GR-KAN, 1 group", lambda: gr_kan(num_groups=1), _operations(HIDDEN, 2, WIDTH + HIDDEN), main=True
    ),
    "frozen": Row(
        "GR-KAN, frozen", lambda: gr_kan(frozen=True), _operations(HIDDEN, 2, WIDTH + HIDDEN), main=True
    ),
    "gelu-norm": Row(
        "GELU, the hidden channels normalised", lambda: MLP(nn.Sequential(nn.GELU(), NORM(HIDDEN)), HIDDEN),
        _operations(HIDDEN),
    ),
    "relu2": Row("ReLU squared", lambda: MLP(SquaredReLU(), HIDDEN), _operations(HIDDEN)),
    "xielu": Row("xIELU", lambda: MLP(XIELU(), HIDDEN), _operations(HIDDEN)),
    "act2": Row(
        "GR-KAN without act1", lambda: MLP(grkan.GroupRational(8), HIDDEN), _operations(HIDDEN, 2, HIDDEN)
    ),
    "gate": Row(
        "SwiGLU with a rational gate", lambda: MLP(grkan.GroupRational(8), GATED, gated=True),
        _operations(GATED, 3, GATED),
    ),
    "order32": Row(
        "GR-KAN, order (3, 2)", lambda: gr_kan(order=(3, 2)), _operations(HIDDEN, 2, WIDTH + HIDDEN, 13)
    ),
    "published": Row(
        "GR-KAN, start as published", as_published, _operations(HIDDEN, 2, WIDTH + HIDDEN), decayed=True
    ),
    "grkan8-slow": Row(
        "GR-KAN, 8 groups, coefficients at a tenth of the rate", gr_kan,
        _operations(HIDDEN, 2, WIDTH + HIDDEN), tuned_as="grkan8", coefficient_rate=0.1,
    ),
    "grkan8-together": Row(
        "GR-KAN, 8 groups, clipped together", gr_kan, _operations(HIDDEN, 2, WIDTH + HIDDEN), clipped_together=True
    ),
    "grkan1-together": Row(
        "GR-KAN, 1 group, clipped together", lambda: gr_kan(num_groups=1),
        _operations(HIDDEN, 2, WIDTH + HIDDEN), clipped_together=True,
    ),
    "grkan8-fewer": Row(
        "GR-KAN, 8 groups, as many operations as GELU", lambda: gr_kan(FEWER),
        _operations(FEWER, 2, WIDTH + FEWER), tuned_as="grkan8",
    ),
    "grkan1-fewer": Row(
        "GR-KAN, 1 group, as many operations", lambda: gr_kan(FEWER, num_groups=1),
        _operations(FEWER, 2, WIDTH + FEWER), tuned_as="grkan1",
    ),
    "frozen-fewer": Row(
        "GR-KAN, frozen, as many operations", lambda: gr_kan(FEWER, frozen=True),
        _operations(FEWER, 2, WIDTH + FEWER), tuned_as="frozen",
    ),
}  # fmt: skip
MAIN = [name for name, row in ROWS.items() if row.main]


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = mlp
        for linear in (self.qkv, self.out):
            nn.init.normal_(linear.weight, std=WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Embeddings of tokens and positions, blocks, and an output layer tied to the token embeddings."""

    def __init__(self, row: Row, settings: Settings) -> None:
        super().__init__()
        self.tokens = nn.Embedding(settings.vocabulary, WIDTH)
        self.positions = nn.Embedding(settings.context, WIDTH)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=WIDTH**-0.5)
        self.blocks = nn.ModuleList([Block(row.mlp()) for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        # Scale the embeddings to the variance that every block adds. (With standard deviation 0.02, as in GPT-2, GELU
        # has 3.011 bits per byte instead of 2.884 after 300,000 tokens.)
        x = (self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]) * WIDTH**0.5
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


# --- Runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Run:
    """One training run."""

    row: str
    tokens: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row}-{self.tokens}-{self.rate:g}-{self.seed}"

    def state(self, output: Path) -> Path:
        """Return the file of the state from which the run goes on."""
        return output / f"{self.name}.pt"


def train(run: Run, output: Path, settings: Settings) -> dict[str, Any]:
    """Train from the saved state of the run, or from the start, and return the result."""
    torch.set_num_threads(1)
    row, text = ROWS[run.row], Text(output, settings)
    torch.manual_seed(run.seed)
    model = Decoder(row, settings)
    groups = grkan.param_groups(model, WEIGHT_DECAY, lr=run.rate, coefficient_lr=run.rate * row.coefficient_rate)
    if row.decayed:
        groups[-1]["weight_decay"] = WEIGHT_DECAY
    optimiser = torch.optim.AdamW(groups, lr=run.rate, betas=(0.9, 0.95))
    peaks = [group["lr"] for group in groups]
    learned = [p for module in model.modules() if isinstance(module, FUNCTIONS) for p in module.parameters()]
    weights = [p for p in model.parameters() if not any(p is q for q in learned)]
    parts = [[*weights, *learned]] if row.clipped_together else [weights, learned]
    steps = run.tokens // (settings.batch * settings.context)
    warmup, every = max(1, steps // 20), max(1, steps // settings.curve_points)
    state, curve, first, seconds = run.state(output), [], 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        curve, first, seconds = saved["curve"], saved["step"], saved["seconds"]
    started, saved_at = time.process_time() - seconds, time.monotonic()
    for step in range(first, steps):
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        factor = min((step + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        inputs, targets = text.draw(run.seed, step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimiser.zero_grad()
        loss.backward()
        for part in parts:
            nn.utils.clip_grad_norm_(part, 1.0)
        optimiser.step()
        if (step + 1) % every == 0:
            curve.append([step + 1, round(text.bits_per_byte(model, settings.curve_windows), 5)])
        if time.monotonic() - saved_at > settings.checkpoint_seconds:
            saved_at = time.monotonic()
            with replacing(state) as temporary:
                now = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
                torch.save(
                    {**now, "curve": curve, "step": step + 1, "seconds": time.process_time() - started}, temporary
                )
    result = {
        **asdict(run),
        "text": text.digest,
        "bits_per_byte": round(text.bits_per_byte(model), 6),
        "seconds": round(time.process_time() - started, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve,
    }
    if run.seed == 0 and run.row in SHOWN:
        result["functions"] = {
            name: [_rounded(rows) for rows in module.coefficients()]
            for name, module in model.named_modules()
            if isinstance(module, grkan.GroupRational)
        }
    return result


def _rounded(rows: Tensor) -> list[list[float]]:
    return [[float(f"{value:.6g}") for value in row] for row in rows.tolist()]


def finish(run: Run, result: dict[str, Any], results: Path, output: Path) -> None:
    """Add the result of a run to the others, and remove its state."""
    records.add(result, results)
    run.state(output).unlink(missing_ok=True)


def tried_rates(row: str, tokens: int, done: dict[Run, dict[str, Any]], settings: Settings) -> dict[float, Any]:
    """Return the learning rates to try with seed 0, and the bits per byte of each: None if missing, inf if diverged.

    For more tokens, these are the best rate of the short runs and its halves, until one of them is worse than the last;
    none while the best is not known.
    """

    def value(rate: float) -> float | None:
        result = done.get(Run(row, tokens, rate, 0))
        if result is None:
            return None
        return result["bits_per_byte"] if math.isfinite(result["bits_per_byte"]) else math.inf

    if tokens == settings.tokens:
        return {rate: value(rate) for rate in RATES}
    last = best_rate(row, settings.tokens, done, settings)
    if last is None:
        return {}
    rate = last / 2
    values = {last: value(last), rate: value(rate)}
    while None not in values.values() and values[rate] < values[last]:
        last, rate = rate, rate / 2
        values[rate] = value(rate)
    return values


def best_rate(row: str, tokens: int, done: dict[Run, dict[str, Any]], settings: Settings) -> float | None:
    """Return the learning rate with the best result of seed 0, or None while a result is missing."""
    values = tried_rates(row, tokens, done, settings)
    return None if not values or None in values.values() else min(values, key=values.__getitem__)


def plan(done: dict[Run, dict[str, Any]], settings: Settings) -> list[tuple[Run | None, int]]:
    """Return the remaining runs and their tokens, the most informative first; None if the learning rate is unknown."""
    tokens, ordered = settings.tokens, [*MAIN, *(name for name in ROWS if name not in MAIN)]
    others = [name for name in ordered if ROWS[name].tuned_as is None and name not in MAIN]
    slow = [name for name in ordered if ROWS[name].coefficient_rate < 1]
    fewer = [name for name in ordered if ROWS[name].tuned_as is not None and name not in slow]
    wanted: list[tuple[Run | None, int]] = []
    other_seeds = range(1, settings.other_seeds)

    def try_rates(names: Sequence[str], length: int, first: int = 0, last: int | None = None) -> None:
        for name in names:
            rates = list(tried_rates(name, length, done, settings))[first:last]
            wanted.extend((Run(name, length, rate, 0), length) for rate in rates)
            if not rates:
                wanted.append((None, length))

    def seeds(names: Sequence[str], numbers: range, length: int) -> None:
        for seed in numbers:
            for name in names:
                rate = best_rate(ROWS[name].tuned_as or name, length, done, settings)
                wanted.append((None if rate is None else Run(name, length, rate, seed), length))

    try_rates(MAIN, tokens)
    try_rates(others, tokens, last=1)
    seeds(MAIN, other_seeds, tokens)
    try_rates(MAIN, settings.long)
    for length in (tokens, settings.long):
        seeds(slow, range(1), length)
    seeds(MAIN, other_seeds[:1], settings.long)
    seeds(fewer, range(settings.other_seeds), tokens)
    try_rates(others, tokens, first=1)
    seeds(others, other_seeds, tokens)
    seeds(MAIN, other_seeds[1:], settings.long)
    seeds(MAIN, range(settings.other_seeds, settings.main_seeds), tokens)
    return [(run, length) for run, length in wanted if run is None or run not in done]


def study(results: Path, output: Path, settings: Settings, jobs: int = 1) -> None:
    """Do all remaining runs, unless the file has results of another text (None: of the first runs, see the log)."""
    remove_leftovers(output)
    digest = Text(output, settings).digest
    others = [run.name for run, result in records.read(results, Run).items() if result["text"] not in (digest, None)]
    if others:
        sys.exit(
            f"{results} must have results of this text, {digest}; {first_of(others)} have another. Debian has probably "
            "updated a package: use the versions that docs/language.md names, or begin a new file"
        )
    if jobs == 1:
        while left := [run for run, _ in plan(records.read(results, Run), settings) if run is not None]:
            print(left[0].name, f"({len(left)} left)", flush=True)
            finish(left[0], train(left[0], output, settings), results, output)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would share PyTorch's threads
    # Workers of a killed study would go on beside the next one.
    end = partial(when_starter_ends, partial(os._exit, 1))
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=end) as pool:
        running: dict[Future[dict[str, Any]], Run] = {}
        while True:
            done = records.read(results, Run)
            left = [run for run, _ in plan(done, settings) if run is not None and run not in running.values()]
            while left and len(running) < jobs:
                run = left.pop(0)
                print(run.name, flush=True)
                running[pool.submit(train, run, output, settings)] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                finish(running.pop(future), future.result(), results, output)


def print_plan(results: Path, settings: Settings, jobs: int) -> None:
    """Print the remaining runs, with the hours that they take at the speed of the finished runs."""
    done = records.read(results, Run)
    left = plan(done, settings)
    timed = {run: result["seconds"] for run, result in done.items() if "seconds" in result}
    spent, made = sum(timed.values()), sum(run.tokens for run in timed)
    speed = made / spent if spent else 6000.0
    for run, length in left:
        name = f"one of {length} tokens, its learning rate not known yet" if run is None else run.name
        print(f"{length / speed / 3600:6.2f} h  {name}")
    hours = sum(length for _, length in left) / speed / 3600
    print(f"{len(done)} done, {len(left)} left: {hours:.1f} core-hours, {hours / jobs:.1f} hours with {jobs} jobs")


# --- Report -------------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """The runs of a row at its best learning rate."""

    row: str
    tokens: int
    rate: float
    by_seed: dict[int, dict[str, Any]] = field(default_factory=dict)

    def value(self, seed: int) -> float:
        return self.by_seed[seed]["bits_per_byte"]

    def gain_on(self, other: "Line | None") -> str:
        """Return by how much this row is lower than the other, seed by seed: mean and standard deviation."""
        if other is None or other is self:
            return ""
        gains = [other.value(seed) - self.value(seed) for seed in self.by_seed if seed in other.by_seed]
        return _spread(gains, "+") if gains else ""


def _spread(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.fmean(values):{sign}.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def lines(done: dict[Run, dict[str, Any]], settings: Settings) -> list[Line]:
    """Return a line for each length and row whose learning rate is known, in the order of the table."""
    found: list[Line] = []
    for tokens in (settings.tokens, settings.long):
        for name, row in ROWS.items():
            rate = best_rate(row.tuned_as or name, tokens, done, settings)
            wanted = (name, tokens, rate)
            by_seed = {run.seed: r for run, r in sorted(done.items()) if (run.row, run.tokens, run.rate) == wanted}
            if by_seed:
                found.append(Line(name, tokens, rate, by_seed))
    return found


def table(done: dict[Run, dict[str, Any]], settings: Settings) -> str:
    """Return the tables in Markdown."""
    found = lines(done, settings)
    text = [
        "| tokens | row | learning rate | seeds | bits per byte | gain on GELU | gain on SwiGLU | parameters | "
        "operations of an MLP | CPU time, s |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for line in found:
        rivals = {other.row: other for other in found if other.tokens == line.tokens}
        results = list(line.by_seed.values())
        cells = (
            f"{line.tokens / 1e6:g}M",
            ROWS[line.row].title,
            f"{line.rate:g}",
            str(len(results)),
            _spread([r["bits_per_byte"] for r in results]),
            line.gain_on(rivals.get("gelu")),
            line.gain_on(rivals.get("swiglu")),
            f"{results[0]['parameters']:,}",
            f"{ROWS[line.row].operations:,}",
            f"{statistics.fmean(r['seconds'] for r in results):.0f}",
        )
        text.append(f"| {' | '.join(cells)} |")
    rates = sorted({run.rate for run in done})
    text += ["", f"| tokens | row, seed 0 | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    text.append(f"| ---: | --- | {' | '.join('---:' for _ in rates)} |")
    for tokens in (settings.tokens, settings.long):
        for name, row in ROWS.items():
            tried = [done.get(Run(name, tokens, rate, 0)) for rate in rates]
            if row.tuned_as is None and any(tried):
                cells = ["" if r is None else f"{r['bits_per_byte']:.4f}" for r in tried]
                text.append(f"| {tokens / 1e6:g}M | {row.title} | {' | '.join(cells)} |")
    return "\n".join(text)


def draw_curves(done: dict[Run, dict[str, Any]], settings: Settings, path: Path) -> None:
    """Plot how far each row is ahead of GELU during training, with the same seeds and batches."""
    from matplotlib.figure import Figure

    found = lines(done, settings)
    lengths = sorted({line.tokens for line in found if line.row != "gelu"})
    if not lengths:
        return
    figure = Figure(figsize=(6.5 * len(lengths), 4.5), layout="constrained")
    for axes, tokens in zip(figure.subplots(1, len(lengths), squeeze=False)[0], lengths, strict=True):
        rows = {line.row: line for line in found if line.tokens == tokens}
        if "gelu" not in rows:
            continue
        for name, line in rows.items():
            seeds = [seed for seed in line.by_seed if seed in rows["gelu"].by_seed]
            if name == "gelu" or not seeds:
                continue
            gains = [
                [b[1] - a[1] for a, b in zip(line.by_seed[s]["curve"], rows["gelu"].by_seed[s]["curve"], strict=True)]
                for s in seeds
            ]
            steps = [point[0] * settings.batch * settings.context / 1e6 for point in line.by_seed[seeds[0]]["curve"]]
            axes.plot(steps, np.mean(gains, 0), label=ROWS[name].title, lw=2 if ROWS[name].main else 1)
        axes.axhline(0.0, color="black", lw=0.8)
        axes.set(xlabel="million tokens", ylabel="bits per byte less than GELU", title=f"{tokens / 1e6:g}M tokens")
        axes.legend(fontsize=7)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def draw_functions(done: dict[Run, dict[str, Any]], settings: Settings, path: Path) -> None:
    """Plot the learned functions, layer by layer, with their start."""
    from matplotlib.figure import Figure

    shown = [line for line in lines(done, settings) if "functions" in line.by_seed.get(0, {})]
    shown = [line for line in shown if line.tokens == max(other.tokens for other in shown if other.row == line.row)]
    if not shown:
        return
    x = np.linspace(-5.0, 5.0, 401)
    figure = Figure(figsize=(3.2 * 2 * LAYERS, 2.6 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 2 * LAYERS, squeeze=False)
    for line, panels in zip(shown, grid, strict=True):
        panels[0].set_ylabel(textwrap.fill(ROWS[line.row].title, 28), fontsize=8)
        functions = line.by_seed[0]["functions"]
        for axes, (name, (numerator, denominator)) in zip(panels, functions.items(), strict=False):
            rows = grkan.GroupRational(
                len(denominator), (numerator, denominator), (len(numerator[0]) - 1, len(denominator[0]))
            )
            for group in range(len(denominator)):
                axes.plot(x, rows.to_function(group)(x), lw=1)
            axes.plot(x, x if "act1" in name else x / (1 + np.exp(-x)), color="black", lw=0.8, ls=":")
            axes.set_title(name.replace(".mlp", ""), fontsize=8)
            axes.set_ylim(-3, 6)
        for axes in panels[len(functions) :]:
            axes.set_axis_off()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)


def report(results: Path, settings: Settings, page: Path) -> None:
    """Put the table between the marks in the page, and the pictures beside it."""
    done = records.read(results, Run)
    before, mark, rest = page.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of the table -->")
    if not mark or not end:
        sys.exit(f"{page} needs the lines <!-- table --> and <!-- end of the table -->")
    write_bytes(page, f"{before}{mark}{table(done, settings)}\n{end}{after}".encode())
    draw_curves(done, settings, page.with_name("language_curves.png"))
    draw_functions(done, settings, page.with_name("language_functions.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/language"))
    parser.add_argument("--results", type=Path, metavar="FILE", help="where the results are, and are added")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--plan", action="store_true", help="print the remaining runs")
    parser.add_argument("--report", type=Path, metavar="PAGE", help="write the table and the pictures")
    options = parser.parse_args()
    settings = Settings()
    results = options.results or options.output / "results.jsonl"
    if options.plan:
        print_plan(results, settings, options.jobs)
    elif options.report:
        report(results, settings, options.report)
    else:
        options.output.mkdir(parents=True, exist_ok=True)
        with open(options.output / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.exit(f"{options.output} is in use by another study")
            if not (options.output / "text.json").exists():
                fetch(options.output / "packages")
            prepare(lambda: read_documents(options.output / "packages"), options.output, settings)
            study(results, options.output, settings, options.jobs)


if __name__ == "__main__":
    main()
