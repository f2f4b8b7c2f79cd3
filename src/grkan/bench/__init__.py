"""Side by side with peers, in one run: the function, the layer and the model, each against what it replaces.

`rivals` are who competes, `suites` in what, `contest` measures, `report` makes tables and JSON of it, and `run` puts
them together for `grkan bench ops|layers|models`. `kernels` reads what the compiler makes of the GPU kernels, for
`grkan bench kernels`.
"""

from .contest import Measurement, Ratio, Result, bytes_kept, compete
from .run import run_kernels, run_suite

__all__ = ["Measurement", "Ratio", "Result", "bytes_kept", "compete", "run_kernels", "run_suite"]
