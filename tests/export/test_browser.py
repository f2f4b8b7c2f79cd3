"""The page of docs/deploy.md in a browser: it draws what the model predicts.

It needs Chromium, and the files of npm's onnxruntime-web, whose folder `dist` the variable ORT_WEB names.
"""

import functools
import json
import os
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import grkan

from ..browser import opened

ORT_WEB = os.environ.get("ORT_WEB")

pytestmark = pytest.mark.skipif(not ORT_WEB, reason="ORT_WEB does not name the folder dist of npm's onnxruntime-web")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_the_page_draws_the_prediction(tmp_path):
    timm = pytest.importorskip("timm")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = timm.create_model("kat_micro_patch2_8").eval()
    torch.nn.init.normal_(model.head.weight)
    grkan.export(model, tmp_path / "kat.onnx")
    pixels = torch.rand(64)
    expected = int(model(((pixels - 0.5) / 0.5).view(1, 1, 8, 8)).argmax())
    (tmp_path / "digit.json").write_text(json.dumps(pixels.tolist()))
    docs = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
    (page,) = re.findall(r"```html\n(.*?)```", docs, re.DOTALL)
    (tmp_path / "page.html").write_text(page)
    for name in ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        shutil.copy(Path(str(ORT_WEB), name), tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with opened(f"http://127.0.0.1:{server.server_port}/page.html") as page:
            page.wait_for_function("document.title.startsWith('prediction')", timeout=100_000)
            assert page.title() == f"prediction {expected}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
