"""Every program of examples/ runs on tiny data, as a user starts it, and does what it says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grkan

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments, launcher=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *launcher, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} times {n} is {n * n}, and {n} and {n} is {2 * n}.\n" for n in range(800)))
    return path


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_language_model(kind, text, tmp_path):
    for package in ("transformers", "tokenizers", "accelerate"):
        pytest.importorskip(package)
    sizes = ["--vocabulary", 300, "--width", 32, "--layers", 1, "--groups", 4, "--context", 32, "--batch", 8]
    output = run("language_model.py", "--text", text, "--output", tmp_path / "model", "--kind", kind, *sizes,
                 "--steps", 80, "--lr", 1e-2)  # fmt: skip
    bits = [float(line.split()[-4]) for line in output.splitlines() if line.startswith("step")]
    assert len(bits) == 10
    assert bits[-1] < 0.8 * bits[0]
    assert " times " in output.splitlines()[-1] or " is " in output  # the sample
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sum(isinstance(m, grkan.GroupRational) for m in model.modules()) == {"llama": 1, "gpt2": 2}[kind]


@pytest.fixture
def encoder(tmp_path):
    """A folder with a small BERT and its tokenizer; two files with sentences and labels."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    good, bad = ("fine", "great", "lovely"), ("poor", "awful", "sad")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", *good, *bad]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    folder = tmp_path / "encoder"
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    lines = [
        f"a {word} film\t{label}" for _ in range(16) for group, label in ((good, "yes"), (bad, "no")) for word in group
    ]
    for name in ("train.tsv", "test.tsv"):
        (tmp_path / name).write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("trainable", ["all", "lora", "functions"])
def test_finetune_encoder(trainable, encoder, tmp_path):
    files = ["--train", tmp_path / "train.tsv", "--test", tmp_path / "test.tsv", "--output", tmp_path / "out"]
    output = run(
        "finetune_encoder.py", "--model", encoder, *files, "--trainable", trainable, "--epochs", 8, "--lr", 5e-3
    )
    assert "converted 1 MLPs" in output
    assert float(output.split()[-1]) > 0.9
    if trainable == "functions":
        assert (tmp_path / "out/functions.safetensors").stat().st_size < 10_000
    else:
        import transformers

        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/model")
        assert any(isinstance(module, grkan.GroupRational) for module in model.modules())


def test_finetune_vit(tmp_path):
    pytest.importorskip("timm")
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "val"):
        for shade, name in ((40, "dark"), (215, "light")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for n in range(8):
                image.new("RGB", (32, 32), (shade + n, shade, shade - n)).save(folder / f"{n}.png")
    arguments = ["--data", tmp_path / "data", "--model", "test_vit", "--random", "--workers", 0, "--batch", 8]
    output = run("finetune_vit.py", *arguments, "--epochs", 4, "--lr", 1e-3, "--output", tmp_path / "kat.safetensors")
    assert "converted" in output
    assert float(output.split()[-2]) > 90
    model = grkan.load_model(tmp_path / "kat.safetensors")
    assert any(isinstance(module, grkan.GroupRational) for module in model.modules())


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_shard(tensor_parallel):
    pytest.importorskip("timm")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    arguments = ["--model", "kat_micro_patch2_8", "--tensor-parallel", tensor_parallel, "--steps", 11]
    output = run("shard.py", *arguments, launcher=launcher)
    losses = [float(line.split()[-1]) for line in output.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]
    assert output.count("holds") == 2


@pytest.fixture
def language(monkeypatch):
    pytest.importorskip("tokenizers")
    pytest.importorskip("matplotlib")
    path = EXAMPLES.parent / "studies" / "language.py"
    spec = importlib.util.spec_from_file_location("language", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "language", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RATES", (1e-2, 3e-3))
    rows = ("gelu", "swiglu", "grkan8", "grkan8-fewer")
    monkeypatch.setattr(module, "ROWS", {name: module.ROWS[name] for name in rows})
    monkeypatch.setattr(module, "MAIN", ["gelu", "grkan8"])
    return module


def test_the_study_of_language(language, tmp_path, monkeypatch, capsys):
    settings = language.Settings(
        vocabulary=300, context=16, batch=2, tokens=32 * 4, long=32 * 6, validation_windows=4, curve_windows=2,
        curve_points=2, held_out=4, main_seeds=2, other_seeds=1, checkpoint_seconds=0.0,
    )  # fmt: skip
    output = tmp_path / "study"
    output.mkdir()

    def documents():
        return ((f"document {n}", " ".join(str(n * i) for i in range(60))) for n in range(40))

    language.prepare(documents, output, settings)
    about = json.loads((output / "text.json").read_text())
    assert about["train"]["documents"] + about["validation"]["documents"] == 40
    assert about["validation"]["documents"] > 2
    tokenizer = language.Tokenizer.from_file(str(output / "tokenizer.json"))
    text = language.Text(output, settings)
    ids = tokenizer.encode("a text, für alle").ids
    assert int(text.bytes[ids].sum()) == len("a text, für alle".encode())

    # A run that is killed goes on and gives what it gives otherwise.
    run = language.Run("grkan8", settings.tokens, 1e-2, 0)
    language.train(run, output, settings)
    whole = (output / f"{run.name}.json").read_bytes()
    (output / f"{run.name}.json").unlink()
    draw, steps = language.Text.draw, []

    def interrupted(self, seed, step):
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return draw(self, seed, step)

    monkeypatch.setattr(language.Text, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        language.train(run, output, settings)
    language.train(run, output, settings)
    assert steps == [0, 1, 2, 2, 3]
    first, second = json.loads(whole), json.loads((output / f"{run.name}.json").read_bytes())
    assert {**first, "seconds": 0} == {**second, "seconds": 0}

    language.print_plan(output, settings, 2)
    assert "1 done, 11 left" in capsys.readouterr().out
    language.study(output, settings)
    assert language.plan(language.results(output), settings) == []
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end of the table -->\nafter\n")
    language.report(output, settings, page)
    written = page.read_text()
    assert written.startswith("before\n<!-- table -->\n| tokens")
    assert "old" not in written
    assert "GR-KAN, 8 groups" in written
    assert "±" in written
    assert (tmp_path / "language_curves.png").stat().st_size > 1000
    assert (tmp_path / "language_functions.png").stat().st_size > 1000
