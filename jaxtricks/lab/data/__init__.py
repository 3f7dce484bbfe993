"""Images or text in, batches out: what can be read, its splits, long tails, and the Grain pipeline.

`source` (examples by index), `image` (decoding, resizing), `files`, `lists`, `arrays`, `custom`,
`records`, `example_proto`, `text` (what is stored where), `splits`, `look` (what the images are like),
`loading`, `checking`, `order`, `balanced` (which example comes when), `walk`, `batches`.
"""

from jaxtricks.lab.data.dataset import Data, Source, UnreadableError, drawn, shuffled
from jaxtricks.lab.data.loading import Report, check, is_text, load
from jaxtricks.lab.data.pipeline import eval_batches, pipeline

__all__ = [
    "Data",
    "Report",
    "Source",
    "UnreadableError",
    "check",
    "drawn",
    "eval_batches",
    "is_text",
    "load",
    "pipeline",
    "shuffled",
]
