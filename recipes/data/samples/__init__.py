"""`sample:NAME`: real rows from pinned packages of the public registry, for trying things out."""

from .table import SAMPLES, Sample, sample_rows

__all__ = ["SAMPLES", "Sample", "sample_rows"]
