"""A training that ends itself by SIGKILL; run by test_interruption.py in a process of its own.

`runpy` gives it the globals `settings`, `folder`, and what kills it: `kill_at_step`, after the optimiser step of that
number, or `kill_at_rename`, in front of that rename of a written file.
"""

import multiprocessing
import os
import signal

import torch

from grkan.train import loop
from grkan.train.config import make_config

given = globals()

torch.set_num_threads(1)
# Or the loading workers would start as this process did, each with imports of its own.
multiprocessing.set_start_method("fork", force=True)
_optimise, _replace = loop._Run._optimise, os.replace
_renames = 0


def _optimise_and_die(run, batches):
    loss = _optimise(run, batches)
    if run.epoch * run.steps + run.step + 1 == given["kill_at_step"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss


def _die_or_replace(source, target):
    global _renames
    _renames += 1
    if _renames == given["kill_at_rename"]:
        os.kill(os.getpid(), signal.SIGKILL)
    _replace(source, target)


loop._Run._optimise = _optimise_and_die
os.replace = _die_or_replace
if os.path.exists(os.path.join(given["folder"], "config.yaml")):
    loop.resume(given["folder"])
else:
    loop.train(make_config(given["settings"], {"output": given["folder"]}))
