"""The studies run on tiny data: they go on where they were stopped, and write their tables and pictures."""

import importlib.util
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

STUDIES = Path(__file__).parent.parent / "studies"


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(STUDIES)
    spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def language(monkeypatch):
    pytest.importorskip("tokenizers")
    pytest.importorskip("matplotlib")
    module = load("language", monkeypatch)
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
    run, results = language.Run("grkan8", settings.tokens, 1e-2, 0), tmp_path / "results.jsonl"

    def done():
        return language.records.read(results, language.Run)

    whole = language.train(run, output, settings)
    run.state(output).unlink()
    draw, steps = language.Text.draw, []

    def interrupted(self, seed, step):
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return draw(self, seed, step)

    monkeypatch.setattr(language.Text, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        language.train(run, output, settings)
    resumed = language.train(run, output, settings)
    assert steps == [0, 1, 2, 2, 3]
    assert {**whole, "seconds": 0} == {**resumed, "seconds": 0}

    language.finish(run, resumed, results, output)
    assert done() == {run: resumed}
    assert not list(output.glob("*.pt"))
    language.print_plan(results, settings, 2)
    assert "1 done, 10 left" in capsys.readouterr().out
    assert language.lines(done(), settings) == []  # its learning rate is not known
    language.study(results, output, settings)
    assert language.plan(done(), settings) == []
    assert {result["text"] for result in done().values()} == {about["digest"]}
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({**resumed, "text": "ab"}) + "\n")
    with pytest.raises(SystemExit, match=f"must have results of this text, {about['digest']}; grkan8-128-0.01-0 have"):
        language.study(other, output, settings)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end of the table -->\nafter\n")
    language.report(results, settings, page)
    written = page.read_text()
    assert written.startswith("before\n<!-- table -->\n| tokens")
    assert "old" not in written
    assert "GR-KAN, 8 groups" in written
    assert "±" in written
    assert (tmp_path / "language_curves.png").stat().st_size > 1000
    assert (tmp_path / "language_functions.png").stat().st_size > 1000


def test_the_learning_rate_of_a_long_run_is_halved_until_that_no_longer_helps(language):
    settings = language.Settings(tokens=100, long=400)
    done = {}

    def finished(tokens, rate, value):
        done[language.Run("gelu", tokens, rate, 0)] = {"bits_per_byte": value}
        return language.best_rate("gelu", 400, done, settings), list(language.tried_rates("gelu", 400, done, settings))

    assert finished(100, 3e-3, 2.0) == (None, [])
    assert finished(100, 1e-2, 1.9) == (None, [1e-2, 5e-3])
    assert finished(400, 1e-2, float("nan")) == (None, [1e-2, 5e-3])
    assert finished(400, 5e-3, 1.7) == (None, [1e-2, 5e-3, 2.5e-3])
    assert finished(400, 2.5e-3, 1.8) == (5e-3, [1e-2, 5e-3, 2.5e-3])


STUDY_WITHOUT_END = """
import sys
from pathlib import Path
sys.path.insert(0, {studies!r})
import language
if __name__ == "__main__":
    settings = language.Settings(
        vocabulary=300, context=16, batch=2, tokens=10**9, validation_windows=4, held_out=4, checkpoint_seconds=0.0
    )
    output = Path({output!r})
    texts = [(f"document {{n}}", " ".join(str(n * i) for i in range(60))) for n in range(40)]
    language.prepare(lambda: iter(texts), output, settings)
    language.study(output / "results.jsonl", output, settings, jobs=2)
"""


def test_the_workers_end_with_a_killed_study(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "program.py").write_text(STUDY_WITHOUT_END.format(studies=str(STUDIES), output=str(tmp_path)))

    def states():
        # Not the temporary files, whose names begin with a dot: they are renamed at any moment.
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*.pt")}

    program = subprocess.Popen([sys.executable, tmp_path / "program.py"], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(states()) == 2)
    finally:
        program.kill()
        program.wait()

    def is_still():
        before = states()
        time.sleep(2.0)
        return states() == before

    wait_until(is_still)


def wait_until(condition):
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.fixture
def few_labels(monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    module = load("few_labels", monkeypatch)
    small = {"SIZES": (4, 8), "SEEDS": 2, "STEPS": 10, "HELD_OUT": 12, "TUNED_WITH": 8}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "RATES", {"all": (1e-3,), "lora": (1e-2, 1e-3), "few": (1e-2,)})
    return module


def test_the_study_of_few_labels(few_labels, tmp_path, monkeypatch):
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{n}" for n in range(30))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    encoder = tmp_path / "encoder"
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(encoder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(encoder)
    output = tmp_path / "study"
    output.mkdir()
    with tarfile.open(output / "sentiment-5.0.2.tgz", "w:gz") as archive:
        for number, source in enumerate(("amazon", "imdb", "yelp")):
            file = tmp_path / f"{source}.json"
            file.write_text(json.dumps([{"text": f"word{10 * number + n}", "class": n % 2} for n in range(10)]))
            archive.add(file, f"package/test/fixtures/{source}.json")
    pool, held_out = few_labels.read_sentences(output)
    assert (len(pool), len(held_out)) == (18, 12)
    assert not {text for text, _ in pool} & {text for text, _ in held_out}

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- few labels -->\n<!-- end of few labels -->\n")
    monkeypatch.setattr(sys, "argv", ["few_labels.py", "--output", str(output), "--encoder", str(encoder)])
    few_labels.main()
    done = few_labels.records.read(output / "results.jsonl", few_labels.Run)
    assert few_labels.next_run(done) is None
    trained = {run.method: result["trained"] for run, result in done.items()}
    assert trained["head"] == 2 * 33
    assert trained["kat-functions"] == 2 * 33 + 2 * 8 * 10
    assert trained["kat-lora-functions"] == trained["lora"] + 2 * 8 * 10
    assert trained["kat-all"] == trained["all"] + 2 * 8 * 10
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--report", str(page)])
    few_labels.main()
    assert page.read_text().count("±") == 2 * (len(few_labels.METHODS) + len(few_labels.PAIRS))
