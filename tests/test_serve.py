"""examples/serve.py answers what `grkan predict` would say, and each mistake of a client with one clear status."""

import asyncio
import importlib.util
import io
import struct
import sys
import zlib
from pathlib import Path

import pytest
import torch

import grkan

for _package in ("uvicorn", "onnxruntime", "onnxscript", "timm"):
    pytest.importorskip(_package)
fastapi = pytest.importorskip("fastapi")
TestClient = pytest.importorskip("fastapi.testclient").TestClient
Image = pytest.importorskip("PIL.Image")

EXAMPLE = Path(__file__).parent.parent / "examples/serve.py"
CLASSES = [f"class {n}" for n in range(10)]


@pytest.fixture(scope="module")
def serve():
    spec = importlib.util.spec_from_file_location("serve", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of gray images of 8 x 8 pixels, and its ONNX file."""
    import timm

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("serve")
    grkan.save_model(timm.create_model("kat_micro_patch2_8"), folder / "model.safetensors", classes=CLASSES)
    grkan.export(grkan.load_model(folder / "model.safetensors"), folder / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def client(serve, exported):
    return TestClient(serve.create_app(serve.Classifier(exported / "model.onnx", threads=1)))


def encode(image, kind="PNG", **arguments):
    file = io.BytesIO()
    image.save(file, kind, **arguments)
    return file.getvalue()


@pytest.fixture(scope="module")
def image():
    pixels = torch.randint(0, 256, (11, 9, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_answer_is_that_of_grkan_predict(kind, client, exported, image, tmp_path):
    from grkan.train.evaluate import predict
    from grkan.train.model import load_trained

    (tmp_path / "image").write_bytes(encode(image, kind))
    (expected,) = predict(load_trained(exported / "model.safetensors"), [str(tmp_path / "image")])
    answer = client.post("/predict?top=3", content=encode(image, kind))
    assert answer.status_code == 200
    found = answer.json()["top"]
    assert [entry["label"] for entry in found] == [label for label, _ in expected["top5"][:3]]
    assert [entry["probability"] for entry in found] == pytest.approx([p for _, p in expected["top5"][:3]], abs=1e-4)


def test_health(client):
    assert client.get("/health").json() == {
        "status": "ok",
        "model": "kat_micro_patch2_8",
        "grkan": grkan.__version__,
    }


def bomb(width, height):
    """A PNG of one pixel whose header promises more."""
    file = bytearray(encode(Image.new("L", (1, 1))))
    file[16:24] = struct.pack(">II", width, height)
    file[29:33] = struct.pack(">I", zlib.crc32(file[12:29]))
    return bytes(file)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 400, "empty"),
        (b"<html>", 415, "JPEG, PNG, WEBP"),
        (encode(Image.new("L", (8, 8)), "GIF"), 415, "JPEG, PNG, WEBP"),
        (encode(Image.new("L", (64, 64), 7), "JPEG")[:-200], 422, "damaged"),
        (bomb(100_000, 100_000), 413, "40,000,000 pixels"),
        (bomb(10_000, 5_000), 413, "40,000,000 pixels"),
        (bytes(10 * 2**20 + 1), 413, "10,485,760 bytes"),
    ],
    ids=["empty", "html", "gif", "cut", "bomb", "large", "long"],
)
def test_mistakes(body, status, words, client):
    answer = client.post("/predict", content=body)
    assert answer.status_code == status
    assert words in answer.json()["detail"]


@pytest.mark.parametrize("top", ["0", "many"])
def test_top_is_checked(top, client, image):
    answer = client.post(f"/predict?top={top}", content=encode(image))
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", "top"]


def test_a_body_is_not_read_beyond_the_limit(serve):
    received = []

    async def receive():
        received.append(2**20)
        return {"type": "http.request", "body": bytes(2**20), "more_body": True}

    request = fastapi.Request({"type": "http", "method": "POST", "headers": []}, receive)
    with pytest.raises(fastapi.HTTPException, match="10,485,760 bytes"):
        asyncio.run(serve.read_body(request))
    assert len(received) == 11


def test_a_model_that_is_not_for_images(serve, tmp_path, monkeypatch, capsys):
    grkan.export(grkan.GRKAN(8, num_groups=2).eval(), tmp_path / "layer.onnx", example=torch.randn(2, 8))
    (tmp_path / "noise.onnx").write_bytes(bytes(range(256)))
    (tmp_path / "empty.onnx").touch()
    messages = {
        "layer": "does not say how to preprocess images",
        "noise": "Protobuf parsing failed",
        "empty": " graph",  # ONNX Runtime 1.20: does not have a graph; 1.27: No graph was found
        "none": "there is no file",
    }
    for name, message in messages.items():
        monkeypatch.setattr(sys, "argv", ["serve.py", "--model", str(tmp_path / f"{name}.onnx")])
        with pytest.raises(SystemExit):
            serve.main()
        error = capsys.readouterr().err.splitlines()[-1]
        assert "--model: " in error
        assert message in error
