"""Convert a small model of every transformer family of timm and transformers, with random weights: `make families`.

    python benchmarks/families.py --only "transformers/*" --json build/families.json

Each family is built in its own process, with a time limit, and converted with random inputs as calibration. Its outputs
before and after are compared on other inputs. The table shows how many activations became rational, what stays and why,
and how far the output is off. A family passes if it converts, is off by at most 1 %, or 2 % with activations that have
kinks, and the report names every elementwise function that stays. `--table` writes the table from the file of earlier
runs.
"""

import argparse
import contextlib
import fnmatch
import inspect
import json
import multiprocessing
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMOOTH, KINKED = 0.01, 0.02
KINKS = ("relu", "hardswish", "hardtanh", "prelu", "hardsigmoid", "threshold")
SECONDS = 150

# One module of timm for each family, without the convolutional networks.
TIMM = (
    "beit", "byoanet", "cait", "coat", "convit", "convnext", "cpubone", "crossvit", "csatv2", "davit", "deepseek_vit",
    "deit", "edgenext", "efficientformer", "efficientformer_v2", "efficientvim", "efficientvit_mit",
    "efficientvit_msra", "eva", "fastvit", "focalnet", "gcvit", "gemma4_vit", "hiera", "hieradet_sam2", "iformer",
    "inception_next", "levit", "lowformer", "mambaout", "maxxvit", "metaformer", "mlp_mixer", "mobilenetv5",
    "mobilevit",
    "mvitv2", "naflexvit", "nest", "nextvit", "pit", "pvt_v2", "qwen3_vit", "repvit", "sequencer", "shvit",
    "swiftformer",
    "swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "tiny_vit", "tnt", "twins", "visformer",
    "vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam", "vitamin",
    "volo", "xcit",
)  # fmt: skip
SMALL = (
    "atto", "femto", "pico", "nano", "xxs", "xxtiny", "micro", "tiny", "s0", "b0", "m0", "t0", "xs", "s12", "xsmall",
    "small",
)  # fmt: skip

# Values that make a configuration of transformers small; a list keeps its length.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim"), 64),
    **dict.fromkeys(("dim", "embedding_size", "width"), 64),
    **dict.fromkeys(("encoder_hidden_size", "decoder_hidden_size", "text_hidden_size"), 64),
    **dict.fromkeys(("emb_dim", "projection_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dim_feedforward"), 128),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 128),
    **dict.fromkeys(("ffn_hidden_size", "feed_forward_dim", "feedforward_dim", "hidden_mlp_dim"), 128),
    **dict.fromkeys(("mlp_dim", "dff"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "num_hidden_layers_encoder"), 2),
    **dict.fromkeys(("depth", "n_head_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads", "num_key_value_heads", "num_kv_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_rope_head_dim"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "attention_head_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k"), 2),
    **dict.fromkeys(("num_selected_experts", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 32),
    "rotary_dim": 8,
    "vocab_size": 128, "image_size": 64, "max_source_positions": 64, "n_positions": 128, "max_position_embeddings": 128,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# A configuration with these sizes may be invalid; then the next set is tried.
ATTEMPTS = (
    tuple(SIZES),
    tuple(key for key in SIZES if not key.endswith("image_size")),
    tuple(key for key in SIZES if re.search("layer|intermediate|ffn|expert|vocab|depth|moe|group", key)),
    tuple(key for key in SIZES if "layer" in key or key in ("vocab_size", "depth")),
    (),
)
MOST_PARAMETERS = 300_000_000


def families() -> Iterator[str]:
    """Yield the names of all families, such as "timm/levit" and "transformers/bert"."""
    yield from (f"timm/{name}" for name in TIMM)
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    yield from (f"transformers/{name}" for name in sorted(MODEL_MAPPING_NAMES))


def timm_model(family: str) -> tuple[Any, Any]:
    """Return the smallest model of a module of timm, and a function that makes inputs for it from a seed."""
    import timm
    import torch
    from timm.models import _registry

    names = [name for name in timm.list_models() if _registry._model_to_module[name] == family]

    def rank(name: str) -> tuple[int, int, int]:
        size = next((i for i, word in enumerate(SMALL) if word in re.split(r"[_.]", name)), len(SMALL))
        number = re.search(r"_(\d{3})(?:_|$)", name)
        return size, int(number[1]) if number else 224, len(name)

    name = min(names, key=rank)
    try:
        model = timm.create_model(name, num_classes=0, depth=2)
    except Exception:  # the model takes no depth, or one for each stage
        model = timm.create_model(name, num_classes=0)
    size = model.pretrained_cfg["input_size"]
    return model.eval(), lambda seed: torch.randn(2, *size, generator=torch.Generator().manual_seed(seed))


def shrink(config: Any, keys: tuple[str, ...]) -> None:
    """Make a configuration and its nested configurations small, in place."""
    from transformers import PretrainedConfig

    layers = None
    for key, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            shrink(value, keys)
        elif key in keys and isinstance(value, int) and not isinstance(value, bool) and value > SIZES[key]:
            with contextlib.suppress(Exception):
                setattr(config, key, SIZES[key])
                layers = 2 if "layers" in key else layers
        elif key in keys and key in ("vocab_size", "num_experts_per_tok") and value is None:
            setattr(config, key, SIZES[key])
        elif key == "use_cache":
            config.use_cache = False  # some caches do not fit the shortened list of layers
        elif keys and key.endswith(("token_id", "token_index")) and isinstance(value, int):
            with contextlib.suppress(Exception):
                setattr(config, key, TOKENS.get(key, 3))
        elif key == "depths" and keys and isinstance(value, (list, tuple)):
            config.depths = [min(int(depth), 2) for depth in value]
    # What a default configuration may leave open.
    known = vars(config)
    heads, width = known.get("num_attention_heads"), known.get("hidden_size")
    open_sizes = {"num_key_value_heads": heads, "head_dim": heads and width and width // heads, "prediction_length": 8}
    for key, size in open_sizes.items():
        if keys and size and key in known and known[key] is None:
            setattr(config, key, size)
    for key in ("layer_types", "layers_block_type", "mlp_layer_types", "attention_layers"):
        value = getattr(config, key, None)
        if layers and isinstance(value, (list, tuple)) and len(value) > layers:
            kinds = list(dict.fromkeys(value))  # one layer of each kind, as far as there is room
            with contextlib.suppress(Exception):
                setattr(config, key, (kinds + list(value))[:layers])


def inputs(model: Any, config: Any) -> Iterator[Any]:
    """Yield functions that make possible inputs for the model from a seed."""
    import torch

    def random(seed: int, *shape: int) -> Any:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vision = getattr(config, "vision_config", config)
    vocabulary = min(int(getattr(text, "vocab_size", None) or 100), 30000)

    def ids(seed: int, length: int = 24) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(min(5, vocabulary - 1), vocabulary, (4, length), generator=generator)

    side, channels = getattr(vision, "image_size", None) or 224, getattr(vision, "num_channels", None) or 3
    sides = side if isinstance(side, (tuple, list)) else (side, side)
    mels, hidden = getattr(config, "num_mel_bins", None) or 80, getattr(text, "hidden_size", None) or 64
    name = model.main_input_name
    decoder = getattr(config, "is_encoder_decoder", False)
    frames = 2 * (getattr(config, "max_source_positions", None) or 64)

    def also(batch: Any, seed: int) -> Any:
        return {**batch, "decoder_input_ids": ids(seed)} if decoder else batch

    makers = {
        "input_ids": [lambda s: also({"input_ids": ids(s)}, s),
                      lambda s: {"input_ids": ids(s), "pixel_values": random(s, 4, channels, *sides)},
                      lambda s: {"input_ids": ids(s), "pixel_values": random(s, 4, 1, channels, *sides)},
                      lambda s: {"input_ids": ids(s), "bbox": torch.zeros(4, 24, 4, dtype=torch.long)}],
        "pixel_values": [lambda s: {"pixel_values": random(s, 4, channels, *sides)},
                         lambda s: {"pixel_values": random(s, 2, 16, channels, *sides)},
                         lambda s: {"pixel_values": random(s, 2, channels, *sides), "input_ids": ids(s)[:2]}],
        "input_features": [lambda s: also({"input_features": random(s, 4, mels, frames)}, s),
                           lambda s: also({"input_features": random(s, 4, frames, mels)}, s)],
        "input_values": [lambda s: {"input_values": random(s, 2, 16000)},
                         lambda s: {"input_values": random(s, 2, 1024, 128)},
                         lambda s: {"input_values": random(s, 2, 1, 16000)}],
    }  # fmt: skip
    if not isinstance(name, list):  # some models have several
        yield from makers.get(name, [])
    yield from makers["input_ids"]
    yield from makers["pixel_values"]
    yield lambda s: {"inputs_embeds": random(s, 4, 24, hidden)}

    def size(key: str, otherwise: int) -> int:
        value = getattr(vision, key, None)
        return value if isinstance(value, int) else otherwise

    patch = channels * size("temporal_patch_size", 1) * size("patch_size", 14) ** 2
    named = {
        "input_ids": lambda s: ids(s, 16),
        "decoder_input_ids": lambda s: ids(s, 16),
        "qformer_input_ids": lambda s: ids(s, 16),
        "pixel_values": lambda s: random(s, 4, channels, *sides),
        "input_values": lambda s: random(s, 4, 16000),
        "input_features": lambda s: random(s, 4, mels, frames),
        "past_values": lambda s: random(s, 4, size("context_length", 32), size("num_input_channels", 1)),
        "query_embeds": lambda s: random(s, 4, 16, hidden),
        "visual_feats": lambda s: random(s, 4, 9, size("visual_feat_dim", 2048)),
        "visual_pos": lambda s: random(s, 4, 9, 4),
        "states": lambda s: random(s, 4, 9, size("state_dim", 17)),
        "actions": lambda s: random(s, 4, 9, size("act_dim", 4)),
        "rewards": lambda s: random(s, 4, 9, 1),
        "returns_to_go": lambda s: random(s, 4, 9, 1),
        "timesteps": lambda s: torch.arange(9).expand(4, 9),
        "hidden_states": lambda s: random(s, 32, patch),  # two images of 4 x 4 patches
        "grid_thw": lambda s: torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }
    parameters = inspect.signature(model.forward).parameters
    if "grid_thw" in parameters:
        named["pixel_values"] = named["hidden_states"]
    accepted = [key for key in parameters if key in named]
    required = [key for key in accepted if key == name or parameters[key].default is inspect.Parameter.empty]
    for chosen in (required, accepted):
        yield lambda s, chosen=chosen: {key: named[key](s) for key in chosen}
    with contextlib.suppress(Exception):
        dummy = dict(model.dummy_inputs)
        yield lambda s: dummy


def transformers_model(family: str) -> tuple[Any, Any]:
    """Return a small model of a type of transformers, and a function that makes inputs for it from a seed."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    problem: Exception | None = None
    for keys in ATTEMPTS:
        try:
            config = CONFIG_MAPPING[family]()
            shrink(config, keys)
            kind: Any = MODEL_MAPPING[type(config)]
            kind = kind[0] if isinstance(kind, (tuple, list)) else kind
            with torch.device("meta"):
                count = sum(p.numel() for p in kind(config).parameters())
            if count > MOST_PARAMETERS:
                raise ValueError(f"{count / 1e6:.0f} million parameters are too many here")
            torch.manual_seed(0)
            model = kind(config).eval()
            assert isinstance(model, transformers.PreTrainedModel)
        except Exception as error:
            problem = problem or error
            continue
        for make in inputs(model, config):
            with contextlib.suppress(Exception):
                output = run(model, make(0))
                if output is not None and not output.any():
                    settle(model, make(0))
                    output = run(model, make(0))
                if output is not None and output.isfinite().all() and output.norm() > 0:
                    return model, make
        problem = problem or ValueError("no inputs were found for it")
    assert problem is not None
    raise problem


def settle(model: Any, batch: Any) -> None:
    """Give batch norms the statistics of a batch: with their initial ones, deep convolutional networks return zeros."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
            module.train()
    run(model, batch)
    model.eval()


def first_float(output: Any) -> Any:
    """Return the first floating-point tensor in a model's output."""
    import torch

    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() and output.numel() else None
    if hasattr(output, "values"):
        output = list(output.values())
    elif hasattr(output, "__dataclass_fields__"):
        output = list(vars(output).values())
    if isinstance(output, (tuple, list)):
        return next((found for part in output if (found := first_float(part)) is not None), None)
    return None


def run(model: Any, batch: Any) -> Any:
    """Return the model's first output, with the same random numbers in each call."""
    import torch

    with torch.no_grad():
        torch.manual_seed(0)
        return first_float(model(**batch) if isinstance(batch, dict) else model(batch))


def measure(family: str, groups: int) -> dict[str, Any]:
    """Build, convert and compare a family, and return its row."""
    import torch

    import grkan

    torch.set_num_threads(1)
    row: dict[str, Any] = {"family": family}
    library, _, name = family.partition("/")
    try:
        model, make = (timm_model if library == "timm" else transformers_model)(name)
        before = run(model, make(1))
        assert before.isfinite().all()
        assert before.norm() > 0
    except Exception as error:
        return {**row, "not_built": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    row["model"] = type(model).__name__
    start = time.perf_counter()
    try:
        report = grkan.convert_(model, calibration=[make(0)], num_groups=groups)
    except Exception as error:
        return {**row, "refused": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    row["seconds"] = round(time.perf_counter() - start, 1)
    after = run(model, make(1))
    row["error"] = float((after - before).norm() / before.norm())
    row["layers"] = len(report.layers)
    row["layouts"] = sorted({layer["layout"] for layer in report.layers})
    row["activations"] = sorted({layer["activation"] for layer in report.layers})
    row["silent"] = silent(model, make(1), [name for name, _ in report.skipped])
    row["skipped"] = sorted({(re.sub(r"\d+", "*", name), reason) for name, reason in report.skipped})
    return row


def silent(model: Any, batch: Any, skipped: list[str]) -> list[str]:
    """Return the modules that still compute an elementwise function, but are not named in the report."""
    from grkan.convert.observe import observe
    from grkan.nn import GroupRational

    names = {module: name for name, module in model.named_modules()}
    left = {names[seen.owner]: seen for seen in observe(model, lambda: run(model, batch)).places.values()}

    def known(name: str) -> bool:
        return any(f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.") for other in skipped)

    missed = [name for name, seen in left.items() if not isinstance(seen.owner, GroupRational) and not known(name)]
    return sorted({re.sub(r"\d+", "*", name) for name in missed})


def passes(row: dict[str, Any]) -> bool:
    """Whether a family that was built converts within its error bound and leaves no function unreported."""
    kinked = any(kink in activation.lower() for activation in row.get("activations", ()) for kink in KINKS)
    return "error" in row and row["error"] <= (KINKED if kinked else SMOOTH) and not row.get("silent")


def in_time(family: str, seconds: float, groups: int) -> dict[str, Any]:
    """Run `measure` in a process with a limit on its CPU time."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        warnings.filterwarnings("ignore")
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        there.send(measure(family, groups))

    process = context.Process(target=work, daemon=True)
    process.start()
    there.close()
    try:
        row = here.recv()
    except EOFError:
        row = {"family": family, "not_built": f"it takes more than {seconds:.0f} s, or more memory than there is"}
    process.kill()
    process.join()
    return row


def line(row: dict[str, Any]) -> str:
    """Format a row for the terminal."""
    if "error" not in row:
        kind = "refused" if "refused" in row else "not_built"
        return f"{row['family']:<44} {kind}: {row[kind]}"
    verdict = "" if passes(row) else "  <<< FAILS"
    kinds = "/".join(row["layouts"])
    head = f"{row['family']:<44} {row['layers']:>3} {kinds:<18} {','.join(row['activations']):<16} {row['error']:.1e}"
    return "\n".join(
        [
            f"{head} {row['seconds']} s{verdict}",
            *(f"      {n}: {r}" for n, r in row["skipped"]),
            *(f"      SILENT {name}" for name in row["silent"]),
        ]
    )


def table(rows: list[dict[str, Any]]) -> str:
    """Return all rows in Markdown."""
    built = [row for row in rows if "not_built" not in row]
    good = sum(map(passes, built))
    text = [f"{good} of {len(built)} families pass; {len(rows) - len(built)} could not be built or run.", ""]
    text += ["| family | converted | activations | stays | relative error |", "|---|---|---|---|---|"]
    for row in built:
        if "error" not in row:
            text.append(f"| {row['family']} | refused | | {row['refused'].replace('|', '/')} | |")
            continue
        reasons = (re.sub(r" in \w+( \(.*\))?(?=: )", "", reason.partition(";")[0]) for _, reason in row["skipped"])
        stays = "; ".join(dict.fromkeys(reasons)).replace("|", "/")
        mark = "" if passes(row) else " (fails)"
        text.append(
            f"| {row['family']} | {row['layers']} {', '.join(row['layouts'])} | {', '.join(row['activations'])} "
            f"| {stays} | {row['error']:.1e}{mark} |"
        )
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="test families that match a pattern like 'timm/*'; repeatable")
    parser.add_argument("--skip", action="append", default=[], help="skip families that match a pattern; repeatable")
    parser.add_argument("--json", type=Path, help="append a line per family to this file; skip families already in it")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of CPU seconds per family (%(default)s)")
    parser.add_argument(
        "--groups", type=int, default=8, help="most groups per function; fewer are faster (%(default)s)"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the rows in the file and test nothing")
    chosen = parser.parse_args(arguments)
    rows = []
    if chosen.json is not None and chosen.json.exists():
        rows = [json.loads(text) for text in chosen.json.read_text().splitlines()]
    if chosen.table:
        print(table(sorted(rows, key=lambda row: row["family"])))
        return 0
    # Import before the fork, so that the processes of all families share these modules.
    import timm  # noqa: F401
    from transformers.models.auto import modeling_auto  # noqa: F401
    from transformers.models.bert import modeling_bert  # noqa: F401
    from transformers.models.mixtral import modeling_mixtral  # noqa: F401
    from transformers.models.vit import modeling_vit  # noqa: F401

    import grkan.convert.convert  # noqa: F401
    from grkan.convert import calibrate, compare, observe, trial  # noqa: F401

    done = {row["family"] for row in rows}
    for family in families():
        if chosen.only and not any(fnmatch.fnmatch(family, pattern) for pattern in chosen.only):
            continue
        if family in done or any(fnmatch.fnmatch(family, pattern) for pattern in chosen.skip):
            continue
        rows.append(in_time(family, chosen.seconds, chosen.groups))
        print(line(rows[-1]), flush=True)
        if chosen.json is not None:
            chosen.json.parent.mkdir(parents=True, exist_ok=True)
            with chosen.json.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    built = [row for row in rows if "not_built" not in row]
    print(
        f"{sum(map(passes, built))} of {len(built)} families pass; {len(rows) - len(built)} could not be built or run"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
