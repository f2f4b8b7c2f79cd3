"""Models: Kolmogorov-Arnold Transformers in timm's registry, model files, and counts of operations.

The transformers need timm: importing `grkan.models.kat` registers them, which `import grkan` does where timm is there.
"""

from .files import load_model, read_metadata, save_model
from .operations import count_operations

__all__ = ["count_operations", "load_model", "read_metadata", "save_model"]
