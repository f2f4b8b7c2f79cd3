"""One process of a run: `grkan` with the given arguments, or a script. The fixture `launch` starts it by `runpy`."""

import os
import runpy
import signal
import sys

import torch
import torch.distributed as dist

from grkan.cli import main

given = globals()


def _run():
    os.chdir(given["folder"])
    for descriptor, path in ((1, given["out"]), (2, given["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), descriptor)
    os.environ.update(given["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server of processes ignores it
    torch.set_num_threads(1)
    if given["script"] is None:
        return main(given["arguments"])
    sys.argv = [given["script"], *given["arguments"]]
    runpy.run_path(given["script"], run_name="__main__")
    return 0


status = 1
try:
    status = _run()
finally:
    sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()  # multiprocessing leaves out what `atexit` would do
sys.exit(status)
