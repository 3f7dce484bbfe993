"""All drawing. Functions take what the rooms and the lab give and return a matplotlib figure; nothing is
shown or saved.

Figures read in grayscale: position, marker, line style and hatching carry the meaning, colour only helps.
"""

from jaxtricks.plot._longtail import shots
from jaxtricks.plot._plans import plan
from jaxtricks.plot._runs import compare, curves, groups
from jaxtricks.plot._tricks import ablation, lr_range

__all__ = ["ablation", "compare", "curves", "groups", "lr_range", "plan", "shots"]
