"""Images or text in, batches out: what can be read, its splits, long tails, and the Grain pipeline."""

from jaxtricks.lab.data.dataset import (
    Data,
    Source,
    UnreadableError,
    sampled,
    shuffled,
)
from jaxtricks.lab.data.loading import Report, check, is_text, load
from jaxtricks.lab.data.pipeline import eval_batches, pipeline

__all__ = [
    "Data",
    "Report",
    "Source",
    "UnreadableError",
    "check",
    "eval_batches",
    "is_text",
    "load",
    "pipeline",
    "sampled",
    "shuffled",
]
