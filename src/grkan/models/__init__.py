"""Models: Kolmogorov-Arnold Transformers in timm's registry, model files, and counts of operations.

The transformers need timm. Importing `grkan.models.kat` registers them; after `import grkan` that happens as soon as
timm is imported.
"""

from .files import load_model, read_metadata, save_model
from .operations import count_operations

__all__ = ["count_operations", "load_model", "read_metadata", "save_model"]
