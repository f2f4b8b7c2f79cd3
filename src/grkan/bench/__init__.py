"""Benchmarks of the function, the layer and the model against what each replaces, in one run.

`rivals` defines the competitors, `suites` the jobs, `contest` measures, `report` makes tables and JSON, and `run` puts
them together for `grkan bench ops|layers|models`. `kernels` reads the compiled code of the GPU kernels, for
`grkan bench kernels`.
"""

from .contest import Measurement, Ratio, Result, bytes_kept, compete
from .run import run_kernels, run_suite

__all__ = ["Measurement", "Ratio", "Result", "bytes_kept", "compete", "run_kernels", "run_suite"]
