from functools import partial

import pytest
import torch

from grkan.bench import contest, deploy, rivals, suites


@pytest.fixture
def tiny(monkeypatch):
    """Suites of the same rivals on next to no work; what is compiled elsewhere is called as it is."""
    monkeypatch.setitem(suites.SUITES, "ops", partial(suites.ops, shapes=((2, 16), (1, 3, 8))))
    monkeypatch.setitem(suites.SUITES, "layers", partial(suites.layers, widths=(8, 16), batch=2, tokens=3))
    names = ("grkan_vit_micro_patch2_8", "kat_micro_patch2_8")
    monkeypatch.setitem(suites.SUITES, "models", partial(suites.models, pairs=(names,), batches=(1, 2)))
    tiny_deploy = partial(suites.deploy, names=names, batches=(2,), runtimes=[(deploy.ONNX_RUNTIME, deploy.FLOAT32)])
    monkeypatch.setitem(suites.SUITES, "deploy", tiny_deploy)
    monkeypatch.setattr(contest, "BLOCK", 0.0)
    monkeypatch.setattr(rivals, "_compiled", lambda function: function)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # what is so small only waits for other threads
    yield
    torch.set_num_threads(threads)
