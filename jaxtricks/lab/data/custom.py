"""Read what a function of the user, package.module:function, returns: a random-access source."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import arrays, dataset
from jaxtricks.lab.data.dataset import SPLITS, Stored, UnreadableError


def stored(name: str) -> Stored:
    """Return the images of the source, or of the sources by split, that package.module:function returns.

    A source has len() and [], and is read from several threads at a time; an element is
    {"image", "label"} or (image, label), the image uint8 [H, W] or [H, W, C]. `labels`
    (integers [N]) and `classes` (names) are used where a source has them.

    Raises:
      UserError: no such function, an error inside it, or something else than that.
    """
    sources = _sources(name, _call(name))
    labels, notes = [], []
    for split, source in sources.items():
        if not _has_labels(source):
            notes.append(
                f"{split}: read once through for its labels; give the source "
                "`labels` to save that"
            )
        labels.append(_labels(name, split, source))
    classes = None
    for source in reversed(sources.values()):
        if getattr(source, "classes", None) is not None:
            classes = tuple(map(str, source.classes))
    together = np.concatenate([x.astype(np.int64) for x in labels])
    num_classes = dataset.check_classes(
        together, name, None if classes is None else len(classes)
    )
    # One list of all examples, whatever the number of splits.
    flat = [
        (split, i)
        for split, source in sources.items()
        for i in range(len(source))
    ]

    def read(i: int) -> tuple[np.ndarray, int]:
        split, j = flat[i]
        image, _ = _element(name, split, sources[split], j)
        return image, image.nbytes

    return Stored(
        name=name,
        names=[_title(name, split, i) for split, i in flat],
        read=read,
        labels=together.astype(np.int32),
        split=np.array([split for split, _ in flat]),
        classes=classes or tuple(map(str, range(num_classes))),
        notes=tuple(notes),
    )


def _call(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it
    module = _guard(
        f"importing {module_name}", lambda: importlib.import_module(module_name)
    )
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(
            f"{module_name} has no function {attribute!r}: define it, or correct --data"
        )
    return _guard(f"calling {name} without arguments", function)


def _guard(doing: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{doing} raised {_description(error)}: correct it, or --data"
        ) from error


def _sources(name: str, value: Any) -> dict[str, Any]:
    """Return split -> source."""
    by_name = value if isinstance(value, Mapping) else {"train": value}
    sources = {}
    for key, source in by_name.items():
        if key not in SPLITS or SPLITS[key] in sources:
            keys = ", ".join(map(repr, by_name))
            raise UserError(
                f"{name} returns a mapping of {keys}: use 'train', "
                "'validation' and 'test'"
            )
        if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise UserError(
                f"{name} returns a {type(source).__name__} for {key}, which "
                "has no len() and []: return a random-access source or a list"
            )
        sources[SPLITS[key]] = source
        if not _guard(f"len() of {name}", lambda source=source: len(source)):
            raise UserError(
                f"the {SPLITS[key]} split of {name} is empty: add examples, or "
                "leave it out"
            )
    if "train" not in sources:
        raise UserError(f"{name} returns no 'train' split: add it")
    return sources


def _has_labels(source: Any) -> bool:
    labels = getattr(source, "labels", None)
    return labels is not None and not callable(labels)


def _labels(name: str, split: str, source: Any) -> np.ndarray:
    if _has_labels(source):
        labels = source.labels
    else:
        labels = [
            _element(name, split, source, i)[1] for i in range(len(source))
        ]
    # An array of the user may be lazy, and raise here.
    labels = _guard(f"labels of {name}", lambda: np.asarray(labels))
    return arrays.check_labels(
        labels, len(source), f"labels of {name} ({split})"
    )


def _element(
    name: str, split: str, source: Any, i: int
) -> tuple[np.ndarray, Any]:
    # Messages name an example by its index in its split, as the user's code has it.
    title = _title(name, split, i)
    try:
        element = source[i]
    except UserError:
        raise
    except Exception as error:
        raise UnreadableError(title, _description(error)) from error
    if isinstance(element, Mapping) and {"image", "label"} <= set(element):
        image, label = element["image"], element["label"]
    elif isinstance(element, tuple | list) and len(element) == 2:
        image, label = element
    else:
        raise UserError(
            f'{title} is a {type(element).__name__}: it must be {{"image": ..., "label": ...}} or '
            "(image, label)"
        )
    return arrays.check_images(
        np.asarray(image), f"image of {title}", ndim=3
    ), label


def _title(name: str, split: str, i: int) -> str:
    return f"example {i} of {name} ({split})"


def _description(error: BaseException) -> str:
    text = str(error).strip()
    return (
        f"{type(error).__name__}: {text.splitlines()[0]}"
        if text
        else type(error).__name__
    )
