"""What is in a data set, every file decoded: the answer to --check-data."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxtricks import _table
from jaxtricks.lab.data import loading, look, splits, text
from jaxtricks.lab.data.dataset import Data, Size


@dataclasses.dataclass(frozen=True)
class Report:
    """What a data set holds; str() is meant to be read.

    Attributes:
      name: what the user called it.
      kind: "image" or "text".
      files: images, or windows of text.
      splits: split -> int [C] images of each class, those that can't be read included; windows of
        text are one class.
      classes: names in label order.
      sizes: (height, width) -> images that have it.
      gray: images stored with one channel.
      unreadable: (name, reason) of every image that can't be read.
      notes: what training would do about it.
    """

    name: str
    kind: str
    files: int
    splits: dict[str, np.ndarray]
    classes: tuple[str, ...]
    sizes: collections.Counter[Size]
    gray: int
    unreadable: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        rows = [
            (name, *(int(n[c]) for n in self.splits.values()))
            for c, name in enumerate(self.classes)
        ]
        if len(rows) > 1:
            rows.append(("all", *(int(n.sum()) for n in self.splits.values())))
        what = "images" if self.kind == "image" else "windows of text"
        lines = [f"{self.name}: {self.files} {what}", *self._lines()]
        lines += ["", str(_table.make(("class", *self.splits), rows)), "", *self.notes]
        lines += [f"can't be read: {name} ({reason})" for name, reason in self.unreadable]
        return "\n".join(lines)

    def _lines(self) -> Sequence[str]:
        if not self.sizes:
            return []
        [(common, n)] = self.sizes.most_common(1)
        ends = (look.spell(f(self.sizes)) for f in (look.smallest, look.largest))
        total = self.sizes.total()
        return (
            f"sizes: {' to '.join(ends)}, most often {look.spell(common)} ({n} of {total})",
            f"colour: {total - self.gray}, gray: {self.gray}, unreadable: {len(self.unreadable)}",
        )


def check(
    name: str,
    *,
    root: str = "",
    imbalance: float = 1.0,
    seed: int = 0,
    validation: float = 0.0,
    test: float = 0.2,
    size: int = 0,
    context: int = 128,
    skip_unreadable: bool = False,
) -> Report:
    """Decode every file of the data set called name, and say what there is.

    Args:
      name, root, seed, validation, test, size, context, skip_unreadable: as `load` has them.
      imbalance: taken so that both take the same, and not used.

    Raises:
      UserError: as `load`, but not for images that can't be read.
    """
    if loading.is_text(name, root):
        return _of_text(text.load(name, context=context, validation=validation, test=test))
    stored = loading.open_images(name, root, skip_unreadable=skip_unreadable)
    index, notes = splits.assign(stored, validation=validation, test=test, seed=seed)
    seen = look.look(stored, everything=True)
    if seen.readable:
        notes += look.aim(seen, size, name)[1]
    num_classes = len(stored.classes)
    return Report(
        name=name,
        kind="image",
        files=len(stored.names),
        splits={s: np.bincount(stored.labels[i], minlength=num_classes) for s, i in index.items()},
        classes=stored.classes,
        sizes=seen.sizes,
        gray=seen.gray,
        unreadable=tuple((e.name, e.reason) for e in seen.unreadable.values()),
        notes=(*stored.notes, *notes),
    )


def _of_text(data: Data) -> Report:
    parts = {"train": data.train, "validation": data.validation, "test": data.test}
    counts = {split: np.array([len(part)]) for split, part in parts.items() if part is not None}
    return Report(
        name=data.name,
        kind="text",
        files=int(sum(n.sum() for n in counts.values())),
        splits=counts,
        classes=("windows",),
        sizes=collections.Counter(),
        gray=0,
        unreadable=(),
        notes=(*data.notes, f"{len(data.classes)} different characters"),
    )
