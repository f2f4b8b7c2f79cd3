"""A sharded training of two processes, one of which SIGTERM stops; test_processes.py starts it."""

import json
import os
import signal
import sys

import torch
from torch.distributed.tensor import DTensor, Shard

from grkan.train import loop
from grkan.train.config import make_config
from grkan.train.interruption import TrainingStopped

torch.set_num_threads(1)
_optimise = loop._Run._optimise


def _watched(run, batches):
    for module in (run.model, run.ema.module):
        assert all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in module.parameters())
    result = _optimise(run, batches)
    moments = [value for state in run.optimizer.state.values() for value in state.values() if value.ndim]
    assert moments
    assert all(isinstance(value, DTensor) for value in moments)
    if run.epoch == 1 and run.step == 1 and run.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return result


loop._Run._optimise = _watched
try:
    loop.train(make_config(json.loads(sys.argv[1])))
except TrainingStopped as stop:
    print(stop)
else:
    sys.exit("the run was not stopped")
