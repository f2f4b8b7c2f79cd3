"""A training that ends itself by a signal; run by test_interruption.py in a process of its own.

`runpy` gives it the globals `settings`, `folder`, and what ends it: `kill_at_step`, after the optimiser step of that
number, or `kill_at_rename`, in front of that rename of a written file; `notice_at_step` or `notice_at_test` for
SIGTERM, which the processes that load images get, too.
"""

import multiprocessing
import os
import signal
import subprocess

import torch

from grkan.train import loop
from grkan.train.config import make_config
from grkan.train.interruption import TrainingStopped

given = globals()

torch.set_num_threads(1)
# Or the loading workers would start as this process did, each with imports of its own.
multiprocessing.set_start_method("fork", force=True)
_optimise, _after_test, _replace = loop._Run._optimise, loop._Run._after_test, os.replace
_renames = 0


def _notice():
    children = multiprocessing.active_children()
    with open(os.path.join(given["folder"], "children"), "w") as file:
        file.write(" ".join(str(child.pid) for child in children))
    processes = [str(child.pid) for child in children] + [str(os.getpid())]
    subprocess.run(["kill", "-TERM", *processes], check=True)  # not from here: the parent may end its children


def _optimise_and_die(run, batches):
    result = _optimise(run, batches)
    step = run.epoch * run.steps + run.step + 1
    if step == given["kill_at_step"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == given["notice_at_step"]:
        _notice()
    return result


def _test_and_stop(run, batch=None):
    if run.epoch + 1 == given["notice_at_test"]:
        _notice()
    _after_test(run, batch)


def _die_or_replace(source, target):
    global _renames
    _renames += 1
    if _renames == given["kill_at_rename"]:
        os.kill(os.getpid(), signal.SIGKILL)
    _replace(source, target)


loop._Run._optimise = _optimise_and_die
loop._Run._after_test = _test_and_stop
os.replace = _die_or_replace
if given["kill_at_rename"] is None:
    loop._Run._draw = lambda run: []  # pictures take as long as all else
try:
    loop.train(make_config(given["settings"], {"output": given["folder"]}), auto_resume=True)
except TrainingStopped as stop:
    with open(os.path.join(given["folder"], "stopped"), "w") as file:
        file.write(str(stop))
    raise
