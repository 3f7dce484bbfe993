"""`python -m benchmarks.longtail`: its options are the fields of `LongtailBench`."""

import shlex
import sys
from collections.abc import Sequence

from benchmarks.longtail import bench
from jaxtricks.lab import cli

PROGRAM = "python -m benchmarks.longtail"


def main(args: Sequence[str] | None = None) -> None:
    """Compare long-tail methods; exits with 2 and one sentence on a user's mistake."""
    words = list(sys.argv[1:] if args is None else args)

    def action() -> None:
        cfg = cli.read(bench.LongtailBench, PROGRAM, words)
        cfg.check()
        bench.run(cfg, f"{PROGRAM} {shlex.join(words)}")

    cli.guarded(action, PROGRAM)


if __name__ == "__main__":
    main()
