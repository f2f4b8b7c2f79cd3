import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import grkan
from grkan import cli
from grkan.cli import main
from grkan.train import loading

TINY = [
    "--data=digits",
    "--model=kat_micro_patch2_8",
    "--batch-size=256",
    "--set=model_args={depth: 1, embed_dim: 16, num_heads: 2, num_groups: 4}",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *TINY, "--epochs=1", f"--output={folder}"]) == 0
    return folder


def _fails(capsys, arguments, status=1):
    """The one line on standard error."""
    assert main([str(a) for a in arguments]) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_help_is_quick():
    code = "import sys, runpy\nsys.argv[1:] = ['--help']\n"
    code += "try: runpy.run_module('grkan', run_name='__main__')\nexcept SystemExit: pass\n"
    code += "assert not {'timm', 'accelerate', 'matplotlib', 'scipy'} & ({m for m in sys.modules} - BEFORE)"
    code = f"import sys, grkan\nBEFORE = set(sys.modules)\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "usage: grkan" in done.stdout


def test_train_prints_a_line_an_epoch_and_the_paths(tmp_path, capsys):
    assert main(["train", *TINY, "--epochs=2", f"--output={tmp_path / 'run'}"]) == 0
    out, err = capsys.readouterr()
    assert [line[:9] for line in out.splitlines()[:2]] == ["epoch 1/2", "epoch 2/2"]
    assert out.splitlines()[-1] == str(tmp_path / "run" / "functions.png")
    assert "\x1b" not in out
    assert err == ""


def test_eval_ends_with_json(run, capsys):
    assert main(["eval", str(run), "--data=digits"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["images"] == 355
    assert result["top1"] == pytest.approx(last["top1"])
    assert result["loss"] == pytest.approx(last["loss"], rel=1e-5)


def test_eval_of_weights_that_are_not_finite(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    model = timm.create_model("kat_micro_patch2_8", depth=1)
    torch.nn.init.constant_(model.head.bias, float("nan"))
    grkan.save_model(model, path, classes=list("0123456789"))
    assert f"the loss of {path} is nan" in _fails(capsys, ["eval", path, "--data=digits"])


def test_unreadable_images_are_counted_and_leave_the_rest(tmp_path, capsys):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / split / name / "0.png")
    (tmp_path / "val" / "cat" / "0.png").write_bytes(b"")
    settings = [*TINY, f"--data={tmp_path}", "--batch-size=2", "--epochs=1", "--workers=0"]
    assert main(["train", *settings, f"--output={tmp_path / 'run'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if "unreadable images" in line)
    column = [name.strip() for name in lines[header].split("┃")].index("unreadable images")
    assert lines[header + 2].split("│")[column].strip() == "1"
    assert main(["eval", str(tmp_path / "run"), f"--data={tmp_path}"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["images"] == 1
    assert err.splitlines()[-1] == "1 of 2 images were unreadable and left out"
    (tmp_path / "val" / "dog" / "0.png").write_bytes(b"")
    assert main(["plot", str(tmp_path / "run"), f"--data={tmp_path}", f"--output={tmp_path / 'f.png'}"]) == 0


def test_eval_tells_of_each_class(run, tmp_path, capsys):
    matrix, picture = tmp_path / "matrix.json", tmp_path / "matrix.png"
    assert main(["eval", str(run), "--data=digits", f"--confusion={matrix}", f"--confusion={picture}"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-3:-1] == [str(matrix), str(picture)]
    result, content = json.loads(out[-1]), json.loads(matrix.read_text())
    counts = np.array(content["matrix"])
    assert content["classes"] == list(result["per_class"]) == list("0123456789")
    assert counts.sum() == result["images"] == 355
    assert result["top1"] == pytest.approx(100 * counts.trace() / 355)
    assert list(result["per_class"].values()) == pytest.approx(100 * counts.diagonal() / counts.sum(axis=1))
    assert result["top1"] <= result["top5"] <= 100
    assert Image.open(picture).width > 500
    for path, message in (
        (tmp_path / "m.doc", "picture must end in"),
        (tmp_path / "no" / "m.json", "folder"),
    ):
        assert message in _fails(capsys, ["eval", run, "--data=digits", "--confusion", path])


def test_predict_gives_a_line_an_image_and_an_error_for_one_that_cannot_be_read(run, tmp_path, capsys):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    paths = [str(tmp_path / name) for name in ("a.png", "none.png", "a.png")]
    assert main(["predict", str(run / "best.safetensors"), *paths]) == 1
    out, err = capsys.readouterr()
    results = [json.loads(line) for line in out.splitlines()]
    assert [result["path"] for result in results] == paths
    assert set(results[0]) == {"path", "label", "probability", "top5"}
    assert len(results[0]["top5"]) == 5
    assert results[1] == {"path": paths[1], "error": "No such file or directory"}
    assert err == "grkan: 1 of 3 images could not be read\n"


def test_predict_of_a_folder_as_csv(run, tmp_path, capsys):
    for name in ("a,b.png", "c.png"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name)
    (tmp_path / "d.png").touch()
    (tmp_path / "notes.txt").touch()
    assert main(["predict", str(run), str(tmp_path), "--format=csv", "--top=3", "--batch-size=2"]) == 1
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["path"] for row in rows] == [str(tmp_path / name) for name in ("a,b.png", "c.png", "d.png")]
    assert [row["error"] for row in rows] == ["", "", "it is empty"]
    assert list(rows[0]) == [
        *("path", "error", "label", "probability", "label_2", "probability_2", "label_3", "probability_3")
    ]
    assert float(rows[0]["probability"]) >= float(rows[0]["probability_2"]) >= float(rows[0]["probability_3"])
    assert err == "grkan: 1 of 3 images could not be read; skipped: 1 *.txt\n"


@pytest.mark.parametrize("data", [[], ["--data=digits"]])
def test_plot_writes_a_picture(run, tmp_path, data, capsys):
    path = tmp_path / "functions.png"
    assert main(["plot", str(run), *data, "--output", str(path)]) == 0
    assert Image.open(path).width > 500
    assert capsys.readouterr().out == f"{path}\n"


def _report(path):
    content = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(content[1])


def test_plot_writes_a_page_of_a_run(run, tmp_path, capsys):
    path = tmp_path / "report.html"
    assert main(["plot", str(run), "--output", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    report = _report(path)
    assert report["title"].endswith(" on digits")
    assert all(sum(function["counts"]) > 0 for function in report["functions"])
    assert sum(map(sum, report["confusion"])) == 355
    top1 = 100 * sum(row[i] for i, row in enumerate(report["confusion"])) / 355
    assert top1 == pytest.approx(report["epochs"][-1]["top1"])


def test_a_page_says_what_it_lacks(run, tmp_path):
    path = tmp_path / "report.html"
    assert main(["plot", str(run / "best.safetensors"), "--output", str(path)]) == 0
    report = _report(path)
    assert "give --data" in report["notes"][0]
    assert (report["epochs"], report["confusion"]) == ([], None)
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    (moved / "config.yaml").write_text("model: kat_micro_patch2_8\ndata: /nowhere\n")
    assert main(["plot", str(moved), "--output", str(path)]) == 0
    assert "/nowhere" in _report(path)["notes"][0]


def test_info_shows_the_twin(capsys):
    assert main(["info", "kat_micro_patch2_8"]) == 0
    out = capsys.readouterr().out
    assert "kat_micro_patch2_8" in out
    assert "grkan_vit_micro_patch2_8" in out
    assert "paper" in out


def test_fit_prints_coefficients_and_draws(tmp_path, capsys):
    assert main(["fit", "gelu", "--interval", "-8", "8", "--output", str(tmp_path / "fit.png")]) == 0
    out = capsys.readouterr().out
    assert len(out.split("numerator")[1].split("denominator")[0].split()) == 6
    assert "on [-8, 8]" in out
    assert Image.open(tmp_path / "fit.png").width > 500


def test_a_folder_of_classes_is_split_told_and_found_again(tmp_path, capsys):
    folder = tmp_path / "images"
    for i, name in enumerate(["dark"] * 20 + ["bright"] * 20):
        path = folder / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 100 + i + 60 * (name == "bright"), np.uint8)).save(path)
    (folder / ".ipynb_checkpoints").mkdir()
    line = _fails(capsys, ["train", *TINY, f"--data={folder}", "--output", tmp_path / "none"])
    assert "--val-split 0.1" in line
    arguments = [*TINY, "--epochs=1", "--batch-size=8", "--workers=0", f"--output={tmp_path / 'run'}", "--seed=3"]
    assert main(["train", *arguments, f"--data={folder}", "--val-split=0.25"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    told = out.splitlines()[:3]
    assert told[0] == f"{folder}: 30 images of 2 classes; skipped: 1 hidden"
    assert told[1] == f"0.25 of each class of {folder}, by seed 3: 10 images of 2 classes"
    assert told[2].startswith("small images, of about 8 x 8 pixels: shift 1, hflip 0.0, color_jitter 0.0")
    for given, images in (([], 10), (["--split=train"], 30), (["--val-split=0.5"], 20), (["--split=dark"], None)):
        arguments = ["eval", str(tmp_path / "run"), f"--data={folder}", "--workers=0", *given]
        if images is None:
            assert "must hold a folder for each class; it has none" in _fails(capsys, arguments)
        else:
            assert main(arguments) == 0
            assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == images
    line = _fails(capsys, ["eval", tmp_path / "run", f"--data={folder}", "--val-split=2"])
    assert line == "grkan: val_split must be in (0, 1); got 2.0"


def test_resume_of_a_finished_run(run, capsys):
    assert main(["train", "--resume", str(run)]) == 0
    assert "is finished: 1 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--epochs=0"], "epochs must be at least 1; got 0"),
        (["train", "--model=kat_tini_patch16_224"], "did you mean kat_tiny_patch16_224"),
        (["train", "--data=nowhere"], "--data must be digits"),
        (["train", "--set=model_args.num_groups=7"], "num_groups"),
        (["train", "--config=nowhere.yaml"], "nowhere.yaml: No such file"),
        (["train", "--resume=nowhere"], "nowhere has no run to resume"),
        (["train", "--resume=nowhere", "--config=x.yaml"], "--config cannot be used with --resume"),
        (["train", "--resume=nowhere", "--auto-resume"], "--auto-resume cannot be used with --resume"),
        (["train", "--lr", "fast"], "lr must be a number; got 'fast'"),
        (["eval", "nowhere", "--data=digits"], "nowhere does not exist"),
        (["info", "kat_tini_patch16_224"], "did you mean kat_tiny_patch16_224"),
        (["fit", "gelo"], "did you mean 'gelu'"),
        (["fit", "gelu", "--interval", "3", "-3"], "interval"),
        (["fit", "gelu", "--interval", "-1e1", "-2e1"], "interval must be two finite numbers, low < high; got (-10.0"),
        (["fit", "gelu", "--interval", "-inf", "0"], "interval must be two finite numbers, low < high; got (-inf"),
        (
            ["compare", "--output=x"],
            "runs must map the name of each run to its settings, unless --models is given; got None",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in _fails(capsys, arguments)
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_told_in_one_line(run, tmp_path, capsys):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((run / "best.safetensors").read_bytes()[:1000])
    assert "broken.safetensors" in _fails(capsys, ["eval", broken, "--data=digits"])
    folder = tmp_path / "run"
    (folder / "state").mkdir(parents=True)
    (folder / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    (folder / "state" / "state.pt").write_bytes((run / "state" / "state.pt").read_bytes()[:1000])
    assert "state.pt is damaged" in _fails(capsys, ["train", "--resume", folder])


def test_a_picture_of_an_unknown_format(run, tmp_path, capsys):
    assert "foo" in _fails(capsys, ["plot", run, "--output", tmp_path / "p.foo"])
    assert not list(tmp_path.iterdir())


def _close_reader(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))


def test_an_output_that_nobody_reads(run, tmp_path, capsys, monkeypatch):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    for arguments in (["predict", run, tmp_path / "a.png"], ["info", "kat_micro_patch2_8"]):
        _close_reader(monkeypatch)
        assert main([str(argument) for argument in arguments]) == 1
        sys.stdout.flush()  # what Python does at its end
        assert capsys.readouterr().err == ""


def test_a_run_whose_output_nobody_reads_can_go_on(tmp_path, capsys, monkeypatch):
    _close_reader(monkeypatch)
    folder = tmp_path / "a run"
    line = _fails(capsys, ["train", *TINY, "--epochs=2", f"--output={folder}"])
    assert line == f"grkan: the reader of the output has closed it; go on with: grkan train --resume '{folder}'"
    monkeypatch.undo()
    assert main(["train", "--resume", str(folder)]) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_an_output_that_takes_nothing_more(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    assert _fails(capsys, ["info", "kat_micro_patch2_8"]).endswith(": No space left on device")
    sys.stdout.flush()


def test_a_closed_output(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["train", *TINY, "--epochs=1", f"--output={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_of_files_in_any_letters(encoding, run, tmp_path, monkeypatch):
    paths = [tmp_path / os.fsdecode(name) for name in ("ü.png".encode(), b"\xff.png")]
    for path in paths:
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding))
    assert main(["predict", str(run), *map(str, paths)]) == 0
    text = content.getvalue().decode(encoding)
    assert [json.loads(line)["path"] for line in text.splitlines()] == [str(path) for path in paths]
    assert ("ü" in text) == (encoding == "utf-8")


def test_interruption(tmp_path, capsys, monkeypatch):
    from grkan.train import loop

    def interrupt(run, batches):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop._Run, "_optimise", interrupt)
    line = _fails(capsys, ["train", *TINY, f"--output={tmp_path / 'run'}"], status=130)
    assert line == f"grkan: interrupted; go on with: grkan train --resume {tmp_path / 'run'}"
    monkeypatch.chdir(tmp_path)
    line = _fails(capsys, ["train", *TINY], status=130)
    assert line == "grkan: interrupted; go on with: grkan train --resume runs/kat_micro_patch2_8-digits"


# In a process of its own: a SIGTERM that is not caught would end the tests. The second time as process 1 of several.
TOLD = """
import json, os, signal, sys
from grkan.cli import main
from grkan.train import loop
optimise = loop._Run._optimise
def told(run, batches):
    os.kill(os.getpid(), signal.SIGTERM)
    return optimise(run, batches)
loop._Run._optimise = told
commands = json.loads(sys.argv[1])
statuses = [main(commands[0])]
os.environ["RANK"] = "1"
statuses.append(main(commands[1]))
print(statuses)
"""


@pytest.mark.parametrize("option", [[], ["--auto-resume"]])
def test_sigterm(option, tmp_path, capsys):
    command = ["train", *TINY, "--epochs=1", f"--output={tmp_path / 'run'}", *option]
    again = ["train", "--resume", str(tmp_path / "run")]
    started = [sys.executable, "-c", TOLD, json.dumps([command, again])]
    ended = subprocess.run(started, capture_output=True, text=True, timeout=120)
    assert ended.stdout.splitlines()[-1] == "[143, 143]", ended
    way_on = "the same command" if option else f"grkan train --resume {tmp_path / 'run'}"
    # Once: the main process has said it.
    assert ended.stderr == f"grkan: stopped by SIGTERM in epoch 1, after step 2 of 5; go on with: {way_on}\n"
    assert main(command if option else again) == 0
    assert "resuming at epoch 1, step 5 of 5" in capsys.readouterr().out


def test_interruption_before_anything_is_written(tmp_path, capsys, monkeypatch):
    from grkan.train import loop

    def interrupt(run, source):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop._Run, "_load_data", interrupt)
    assert _fails(capsys, ["train", *TINY, f"--output={tmp_path / 'run'}"], status=130) == "grkan: interrupted"


@pytest.mark.parametrize(("module", "package"), [("accelerate.utils", "accelerate"), ("yaml", "pyyaml")])
def test_a_missing_package_is_named(module, package, capsys, monkeypatch):
    def fail(*_):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(cli, "make_config", fail)
    assert _fails(capsys, ["train"]) == f"grkan: {package} is missing; install it with: pip install {package}"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "grkan: there is not enough memory"),
        (MemoryError("8 TiB"), "grkan: there is not enough memory: 8 TiB"),
        (torch.OutOfMemoryError("CUDA"), "grkan: the GPU ran out of memory; lower --batch-size, or raise"),
    ],
)
def test_memory_that_is_not_there_is_told_in_one_line(error, line, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "make_config", fail)
    assert _fails(capsys, ["train"]).startswith(line)


def test_a_killed_loading_process_is_told_in_one_line(run, capsys, monkeypatch):
    monkeypatch.setattr(loading._Samples, "__getitem__", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    line = _fails(capsys, ["eval", run, "--data=digits", "--workers=1"])
    assert line == "grkan: a process that loads images was killed, perhaps because memory ran out; try fewer --workers"


@pytest.mark.parametrize(
    "bug",
    [
        TypeError("'NoneType' object is not subscriptable"),
        ValueError("x"),
        RuntimeError("illegal memory access"),
        ModuleNotFoundError("No module named 'grkan.foo'", name="grkan.foo"),
    ],
    ids=lambda bug: type(bug).__name__,
)
def test_a_bug_keeps_its_traceback(bug, monkeypatch):
    def fail(*_):
        raise bug

    monkeypatch.setattr(cli, "make_config", fail)
    with pytest.raises(type(bug)) as caught:
        main(["train"])
    assert caught.value is bug


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--lr", "["], "grkan train: argument --lr: '[' is not a YAML value"),
        (
            ["train", "--set=lr"],
            "grkan train: argument --set: must be key=value, with null for no value; got 'lr'; see",
        ),
        (["train", "--set=model_args.img_size="], "argument --set: must be key=value, with null for no value"),
        (["train", "--set=lx=1"], "argument --set: unknown setting 'lx'; did you mean lr"),
        (["train", "--resume="], "argument --resume: must not be empty"),
        (
            ["eval", "run", "--data=digits", "--workers=-1"],
            "argument --workers: must be a whole number, at least 0; got",
        ),
        (["compare", "--output=x", "--jobs=0"], "argument --jobs: must be a whole number, at least 1; got 0"),
        (["train", "a\nb"], "grkan: unrecognized arguments: a b"),
        (["trian"], "grkan: argument COMMAND: invalid choice: 'trian'"),
        (["eval"], "grkan eval: the following arguments are required: DIR|FILE, --data"),
    ],
)
def test_a_wrong_command_line_gets_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_picture_for_a_folder_that_is_not_there(tmp_path, capsys):
    path = tmp_path / "none" / "gelu.png"
    line = _fails(capsys, ["fit", "gelu", "--interval", -4, 4, "--output", path])
    assert line == f"grkan: {path.parent}: there is no such folder"


def test_the_beginning_of_a_name_is_understood(capsys):
    assert "did you mean kat_tiny_patch16_224?" in _fails(capsys, ["info", "kat_tiny"])


@pytest.mark.parametrize(("version", "problem"), [(None, "triton"), ("3.5.1", "Triton is version 3.5.1, and 3.6")])
def test_bench_kernels_without_a_triton_that_will_do(version, problem, capsys, monkeypatch):
    module = None  # `import` then raises ModuleNotFoundError
    if version:
        module = types.ModuleType("triton")
        module.__version__ = version
    monkeypatch.setitem(sys.modules, "triton", module)
    line = _fails(capsys, ["bench", "kernels"])
    assert line.startswith('grkan: grkan bench kernels needs Triton; install it with: pip install "triton>=3.6"')
    assert problem in line


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A ViT after one epoch."""
    folder = tmp_path_factory.mktemp("vit") / "run"
    arguments = ["--data", "digits", "--model", "grkan_vit_micro_patch2_8", "--epochs", "1", "--output", str(folder)]
    assert main(["train", *arguments, "--set", "model_args.depth=1", "--set", "model_args.patch_size=4"]) == 0
    return folder


def test_convert_then_eval_and_train(vit, tmp_path, capsys):
    output, picture = tmp_path / "kat.safetensors", tmp_path / "fits.png"
    arguments = ["--checkpoint", str(vit), "--data", "digits", "--images", "64", "--num-groups", "2"]
    assert main(["convert", *arguments, "--output", str(output), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [str(picture), str(output)]
    assert any(line.startswith("blocks.0.mlp") for line in printed)
    assert picture.stat().st_size > 10_000
    results = []
    for path in (vit, output):
        assert main(["eval", str(path), "--data", "digits"]) == 0
        results.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert abs(results[1]["loss"] - results[0]["loss"]) < 0.01
    tuned = tmp_path / "tuned"
    arguments = ["--data", "digits", "--init", str(output), "--epochs", "1", "--trainable", "coefficients"]
    assert main(["train", *arguments, "--output", str(tuned)]) == 0
    before, after = grkan.load_model(output).state_dict(), grkan.load_model(tuned / "last.safetensors").state_dict()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"numerator", "denominator"}
    assert main(["train", "--resume", str(tuned)]) == 0


def test_convert_takes_a_checkpoint_of_timm(tmp_path, capsys):
    model = timm.create_model("grkan_vit_micro_patch2_8", num_classes=4)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "vit.pth")
    output = tmp_path / "kat.safetensors"
    arguments = ["--model", "grkan_vit_micro_patch2_8", "--checkpoint", str(tmp_path / "vit.pth"), "--num-groups", "1"]
    assert main(["convert", *arguments, "--output", str(output)]) == 0
    assert grkan.load_model(output).num_classes == 4


def test_convert_makes_an_architecture_a_kat_to_train(tmp_path, capsys):
    output = tmp_path / "kat.safetensors"
    arguments = ["--model", "grkan_vit_micro_patch2_8", "--start", "scratch", "--output", str(output)]
    assert main(["convert", *arguments]) == 0
    model = grkan.load_model(output)
    assert model.blocks[0].mlp.act2.init_name == "swish"
    width = model.blocks[0].mlp.fc2.in_features
    alpha = grkan.variance_gain("swish")
    assert float(model.blocks[0].mlp.fc2.weight.detach().var() * width) == pytest.approx(alpha, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model, --checkpoint or both"),
        (["--model", "grkan_vit_micro_patch2_8", "--start", "random"], "--start must be 'pretrained' or 'scratch'"),
        (["--start", "scratch", "--plot", "fits.png"], "--start scratch fits none"),
        (["--model", "vit_micro"], "unknown model 'vit_micro'; did you mean"),
        (["--checkpoint", "none.pth"], "none.pth does not exist"),
        (
            ["--model", "grkan_vit_micro_patch2_8", "--checkpoint", "setup.py"],
            "setup.py holds no weights of a grkan_vit_micro",
        ),
    ],
)
def test_mistakes_of_convert_get_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.py").write_text("no weights")
    assert main(["convert", *arguments, "--output", str(tmp_path / "kat.safetensors")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "kat.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "."], ".: is a folder, not a file"),
        (["--output", "kat.safetensors", "--plot", "fits.docx"], "the name of a picture must end in .png, .svg, .pdf"),
        (["--output", "kat.safetensors", "--plot", "fits"], "the name of a picture must end in .png, .svg, .pdf"),
        (["--output", "kat.safetensors", "--data", "images"], "--data images has no readable image"),
    ],
)
def test_what_convert_cannot_write_or_read(options, message, vit, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        (tmp_path / "images" / part / "zero").mkdir(parents=True)
        (tmp_path / "images" / part / "zero" / "0.png").write_text("no image")
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", "--checkpoint", str(vit), *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""  # no report
    assert err.startswith(f"grkan: {message}")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("option", ["--output", "--plot"])
def test_convert_looks_for_its_folders_before_the_work(option, vit, tmp_path, capsys):
    written = {"--output": tmp_path / "kat.safetensors", "--plot": tmp_path / "fits.png"}
    written[option] = tmp_path / "nowhere" / written[option].name
    assert main(["convert", "--checkpoint", str(vit), *(str(part) for pair in written.items() for part in pair)]) == 1
    out, err = capsys.readouterr()
    assert out == ""  # no report
    assert err == f"grkan: {tmp_path / 'nowhere'}: there is no such folder\n"
    assert not any(path.exists() for path in written.values())


@pytest.fixture
def onnxruntime():
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    return pytest.importorskip("onnxruntime")


def test_export(run, tmp_path, capsys, monkeypatch, onnxruntime):
    library = tmp_path / "lib" / "libgrkan.so"
    library.parent.mkdir()
    library.write_bytes(b"code")
    monkeypatch.setattr(grkan, "onnx_library", lambda: library, raising=False)
    path = tmp_path / "model.onnx"
    assert main(["export", str(run), f"--output={path}", "--with-library"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(path), str(tmp_path / "libgrkan.so")]
    assert err == ""
    assert (tmp_path / "libgrkan.so").read_bytes() == b"code"
    model, x = grkan.load_model(run / "best.safetensors"), torch.randn(3, 1, 8, 8)
    session = onnxruntime.InferenceSession(str(path))
    (y,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == [str(i) for i in range(10)]


def test_export_overwrites_neither_the_model_nor_its_own_file(run, tmp_path, capsys, monkeypatch):
    model = tmp_path / "model.safetensors"
    model.write_bytes((run / "best.safetensors").read_bytes())
    line = _fails(capsys, ["export", model, "--output", tmp_path / "." / "model.safetensors"])
    assert "--output must not be the model itself" in line
    grkan.load_model(model)
    monkeypatch.setattr(grkan, "onnx_library", lambda: tmp_path / "lib" / "libgrkan.so", raising=False)
    line = _fails(capsys, ["export", model, "--output", tmp_path / "libgrkan.so", "--with-library"])
    assert "--output must not have the name of the library beside it" in line
    assert list(tmp_path.iterdir()) == [model]


def test_export_of_a_run_for_timm(run, tmp_path, capsys):
    assert main(["export", str(run), "--format=timm", f"--output={tmp_path / 'kat'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'kat'}\n"
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    card = (tmp_path / "kat" / "README.md").read_text()
    assert f"| {line['top1']:.2f} % | {line['loss']:.4f} |" in card
    settings = (tmp_path / "kat" / "train.yaml").read_text()
    assert "epochs: 1\n" in settings
    assert str(run) not in settings + card
    line = _fails(capsys, ["export", run, "--format=timm", "--output", tmp_path / "kat"])
    assert "already exists and is not an empty folder; choose a new or empty one" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "tflite"], "--format must be 'onnx' or 'openvino' or 'pt2' or .*; got 'tflite'"),
        (["--format", "pt2"], r"path must end in \.pt2 for format 'pt2'; got 'out/model'"),
        (["--format", "pt2", "--with-library"], "--with-library is for --format onnx, not pt2"),
        (["--format", "pt2", "--int8"], "int8 is for format 'onnx'; got format 'pt2'"),
        (["--output", "out"], "out: is a folder, not a file"),
        (["--output", "missing/model.onnx"], "missing: there is no such folder"),
    ],
)
def test_mistakes_in_export(run, tmp_path, capsys, monkeypatch, onnxruntime, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    line = _fails(capsys, ["export", run, "--output", "out/model", *arguments])
    assert re.search(message, line), line
    assert not any((tmp_path / "out").iterdir())


def test_export_names_a_missing_package(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.delitem(sys.modules, "grkan.export.onnx", raising=False)
    line = _fails(capsys, ["export", run, "--output", tmp_path / "model.onnx"])
    assert line == "grkan: format 'onnx' needs onnxscript; install it with: pip install \"grkan[onnx]\""
