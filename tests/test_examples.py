"""Every program of examples/ runs on tiny data and does what it says; a mistake ends it with one clear line."""

import gc
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grkan

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a program of examples/ in this process, and return what it printed."""

    def start(name, *arguments):
        spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return start


@pytest.fixture
def fails(run, capsys):
    """Run it with a mistake, and return the last line on standard error."""

    def start(name, *arguments):
        with pytest.raises(SystemExit) as stopped:
            run(name, *arguments)
        assert stopped.value.code
        return stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err.splitlines()[-1]

    return start


@pytest.fixture
def clipped(monkeypatch):
    """Return the calls that clip gradients: for each, whether its parameters are coefficients of functions."""
    clip, calls, functions = torch.nn.utils.clip_grad_norm_, [], set()

    def record(parameters, max_norm, *arguments, **options):
        parameters = list(parameters)
        if max_norm == math.inf:  # the Trainer only measures the norm
            return clip(parameters, max_norm, *arguments, **options)
        if not calls:
            rationals = [thing for thing in gc.get_objects() if type(thing) is grkan.GroupRational]
            functions.update(id(p) for rational in rationals for p in rational.parameters())
        calls.append({id(p) in functions for p in parameters})
        return clip(parameters, max_norm, *arguments, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", record)
    return calls


def check_clipping(clipped):
    assert {True} in clipped
    assert {False} in clipped
    assert {True, False} not in clipped


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{n} times {n} is {n * n}, and {n} and {n} is {2 * n}.\n" for n in range(800)))
    return path


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_language_model(kind, run, clipped, text, tmp_path):
    for package in ("transformers", "tokenizers", "accelerate"):
        pytest.importorskip(package)
    sizes = ["--vocabulary", 300, "--width", 32, "--layers", 1, "--groups", 4, "--context", 128, "--batch", 2]
    output = run("language_model.py", "--text", text, "--output", tmp_path / "model", "--kind", kind, *sizes,
                 "--steps", 80, "--lr", 1e-2)  # fmt: skip
    bits = [float(line.split()[-4]) for line in output.splitlines() if line.startswith("step")]
    assert len(bits) == 10
    assert bits[-1] < 0.8 * bits[0]
    check_clipping(clipped)
    sample = output.rpartition("bits per byte\n")[2]
    assert len(sample) > 150
    assert any(word in sample for word in ("times", "and"))
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
    sizes["initializer_range"] = 0.1  # or what is frozen would tell no word from another
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    lines = [
        f"a {word} film\t{label}" for _ in range(16) for group, label in ((good, "yes"), (bad, "no")) for word in group
    ]
    for name in ("train.tsv", "test.tsv"):
        (tmp_path / name).write_text("\n".join(lines))
    return folder


def test_mistakes_in_the_text_of_a_language_model(fails, text, tmp_path):
    for package in ("transformers", "tokenizers", "accelerate"):
        pytest.importorskip(package)
    assert "--text: there is no file" in fails("language_model.py", "--text", tmp_path / "none.txt")
    assert "--text is too short" in fails("language_model.py", "--text", text, "--batch", 512)
    assert "--width must be a multiple of 64" in fails("language_model.py", "--text", text, "--width", 100)


@pytest.mark.parametrize("trainable", ["all", "lora", "functions"])
def test_finetune_encoder(trainable, run, clipped, encoder, tmp_path):
    files = ["--train", tmp_path / "train.tsv", "--test", tmp_path / "test.tsv", "--output", tmp_path / "out"]
    rates = ["--lr", 3e-3 if trainable == "all" else 1e-2, "--function-lr", 1e-2]
    output = run("finetune_encoder.py", "--model", encoder, *files, "--trainable", trainable, "--epochs", 32, *rates)
    assert "converted 2 MLPs" in output
    assert float(output.split()[-1]) > (0.75 if trainable == "functions" else 0.9)  # one half at the start
    check_clipping(clipped)
    if trainable == "functions":
        assert (tmp_path / "out/functions.safetensors").stat().st_size < 10_000
    else:
        import transformers

        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/model")
        assert any(isinstance(module, grkan.GroupRational) for module in model.modules())


def test_mistakes_in_the_files_of_an_encoder(fails, encoder, tmp_path):
    train, wrong = tmp_path / "train.tsv", tmp_path / "wrong.tsv"
    files = ["finetune_encoder.py", "--model", encoder, "--train", train, "--test", wrong]
    assert "--test: there is no file" in fails(*files)
    wrong.write_text("a film\tperhaps\n")
    assert "--test has labels that --train does not have: perhaps" in fails(*files)
    wrong.write_text("a fine film\tyes\na film yes\n")
    assert "entry 2 has no tab" in fails(*files)


def test_finetune_vit(run, clipped, fails, tmp_path):
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
    check_clipping(clipped)
    (tmp_path / "data/val/dark").rename(tmp_path / "data/val/black")
    assert "must have the same classes" in fails("finetune_vit.py", *arguments)
    assert "there is no folder" in fails("finetune_vit.py", "--data", tmp_path / "none")
    model = grkan.load_model(tmp_path / "kat.safetensors")
    assert any(isinstance(module, grkan.GroupRational) for module in model.modules())


def test_shard():
    pytest.importorskip("timm")

    def start(*arguments):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        arguments = ["--model", "kat_micro_patch2_8", "--steps", 11, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*launcher, str(EXAMPLES / "shard.py"), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    for tensor_parallel in (1, 2):
        done = start("--tensor-parallel", tensor_parallel)
        assert done.returncode == 0, done.stderr[-3000:]
        # Not by lines, because torchrun mixes those of its processes.
        losses = [float(loss) for loss in re.findall(r"step \d+: loss (\d+\.\d{3})", done.stdout)]
        assert len(losses) > 1
        assert losses[-1] < losses[0]
        assert done.stdout.count("holds") == 2


def test_mistakes_in_sharding(fails, monkeypatch):
    assert "start it by torchrun" in fails("shard.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--tensor-parallel must divide the number of processes, 2; got 3" in fails(
        "shard.py", "--tensor-parallel", 3
    )
