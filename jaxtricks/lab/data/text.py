"""Read text as windows of characters."""

import pathlib

import numpy as np

from jaxtricks.lab.config import UserError
from jaxtricks.lab.data.dataset import Data, Example, Source


def load(name: str, *, context: int, validation: float, test: float) -> Data:
    """Return windows of context + 1 characters; the splits are stretches: training, validation, test.

    Args:
      name: "topics", or a text file in UTF-8.
      context: characters that a window predicts; also the stride of the windows.
      validation, test: shares of the characters; 0 makes no validation split.

    Raises:
      UserError: not UTF-8, or too short for a window in every split.
    """
    text = topics() if name == "topics" else read(pathlib.Path(name))
    # Code points as numbers, so that NumPy can sort them.
    points, codes = np.unique(
        np.frombuffer(text.encode("utf-32-le"), np.uint32), return_inverse=True
    )
    codes = codes.astype(np.int32)
    lengths = {
        "validation": round(validation * len(codes)),
        "test": round(test * len(codes)),
    }
    start = len(codes) - lengths["test"]
    middle = start - lengths["validation"]
    stretches = {
        "train": codes[:middle],
        "validation": codes[middle:start],
        "test": codes[start:],
    }
    # Stretches, not windows at random: neighbouring windows are nearly the same text.
    if not validation:
        del stretches["validation"]
    for split, stretch in stretches.items():
        if len(stretch) <= context:
            raise UserError(
                f"{name} is too short: its {split} split has {len(stretch)} "
                f"characters and a window needs {context + 1}, so give a "
                "longer text or a smaller --context"
            )
    parts = {
        split: windows(stretch, context) for split, stretch in stretches.items()
    }
    targets = stretches["train"][1 : len(parts["train"]) * context + 1]
    return Data(
        name=name,
        kind="text",
        train=parts["train"],
        validation=parts.get("validation"),
        test=parts["test"],
        classes=tuple(map(chr, points.tolist())),
        shape=(context + 1,),
        flip=False,
        counts=np.bincount(targets, minlength=len(points)),
        notes=(_sentence(stretches),),
    )


def topics() -> str:
    """Return the help texts of Python's statements, embedded in the standard library."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def read(path: pathlib.Path) -> str:
    """Return the text of a file.

    Raises:
      UserError: it can't be read or isn't UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.object[error.start]:#04x} at "
            f"{error.start}): convert it, by iconv for example"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} can't be read ({error.strerror}): give a text file"
        ) from error


def windows(codes: np.ndarray, context: int) -> Source:
    """Return {"text": int32 [context + 1]}, the last character of a window being the first of the next."""

    def example(i: int) -> tuple[Example, int]:
        window = codes[i * context : (i + 1) * context + 1]
        return {"text": window}, window.nbytes

    return Source(example, (len(codes) - 1) // context)


def _sentence(stretches: dict[str, np.ndarray]) -> str:
    parts = [f"{split} {len(stretch)}" for split, stretch in stretches.items()]
    return f"stretches of the text, in characters: {', '.join(parts)}"
