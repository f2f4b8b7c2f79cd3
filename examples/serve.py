"""Serve an image classifier over HTTP: ONNX Runtime with grkan's kernel, behind FastAPI.

    pip install "grkan[onnx,train]" fastapi uvicorn
    grkan export runs/photos --output kat.onnx
    python examples/serve.py --model kat.onnx --port 8000
    curl --data-binary @photo.jpg "localhost:8000/predict?top=3"

The body of a request is the image file itself: JPEG, PNG or WebP. The image is preprocessed as the ONNX file says, as
in `grkan predict`.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.concurrency import run_in_threadpool
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, InvalidGraph, InvalidProtobuf
from PIL import Image

import grkan
from grkan.train.images import open_image
from grkan.train.loading import evaluation_transform

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 40_000_000
FORMATS = ("JPEG", "PNG", "WEBP")


class Classifier:
    """An exported model in ONNX Runtime, with the preprocessing and the class names from its file."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            options.register_custom_ops_library(str(grkan.onnx_library()))
        except grkan.errors.GrkanRuntimeError as error:  # the model runs without the kernel, but slowly
            print(error, file=sys.stderr)
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "preprocessing" not in metadata:
            raise ValueError(f"{path} does not say how to preprocess images; write it with `grkan export` from a run")
        self.name, self.classes = metadata["model"], json.loads(metadata.get("classes", "null"))
        self.transform = evaluation_transform(json.loads(metadata["preprocessing"]))

    def predict(self, body: bytes, top: int) -> dict[str, Any]:
        """Return the `top` most probable classes of an image file, whose content is not trusted."""
        x = self.transform(read_image(body))[None].numpy()
        (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: x})
        odds = np.exp(logits[0] - logits[0].max())
        probabilities = odds / odds.sum()
        best = [int(index) for index in np.argsort(-probabilities)[:top]]
        names = self.classes or range(len(probabilities))
        return {"top": [{"label": str(names[i]), "probability": round(float(probabilities[i]), 6)} for i in best]}


def read_image(body: bytes) -> Image.Image:
    """Decode an image after checking its header: a file of a few kilobytes can hold billions of pixels."""
    if not body:
        raise HTTPException(400, "The body is empty; it must be an image file.")
    try:
        with Image.open(io.BytesIO(body), formats=FORMATS) as header:
            width, height = header.size
        if width * height > MAX_PIXELS:
            raise Image.DecompressionBombError
        return open_image(io.BytesIO(body))
    except Image.UnidentifiedImageError:
        raise HTTPException(415, f"The body is not an image file of type {', '.join(FORMATS)}.") from None
    except Image.DecompressionBombError:
        raise HTTPException(413, f"The image has more than {MAX_PIXELS:,} pixels.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise HTTPException(422, f"The image is damaged: {error}") from None


async def read_body(request: Request) -> bytes:
    """Read at most MAX_BYTES, whatever the request says about its length."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise HTTPException(413, f"The image file has more than {MAX_BYTES:,} bytes.")
    return bytes(body)


def create_app(classifier: Classifier) -> FastAPI:
    app = FastAPI(title=classifier.name)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "ok", "model": classifier.name, "grkan": grkan.__version__}

    @app.post("/predict")
    async def predict(request: Request, top: Annotated[int, Query(ge=1, le=1000)] = 5) -> dict[str, Any]:
        return await run_in_threadpool(classifier.predict, await read_body(request), top)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an ONNX file that grkan exported")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=0, help="threads for one image; 0: all cores")
    options = parser.parse_args()
    if not options.model.is_file():
        parser.error(f"--model: there is no file {options.model}")
    try:
        classifier = Classifier(options.model, options.threads)
    except (ValueError, Fail, InvalidArgument, InvalidGraph, InvalidProtobuf) as error:
        parser.error(f"--model: {str(error).strip()}")
    uvicorn.run(create_app(classifier), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
