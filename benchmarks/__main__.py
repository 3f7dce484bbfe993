"""Prints every table; `python -m benchmarks.optimizers` prints that of the optimizers alone."""

from benchmarks import amp, common, optimizers, recompute
from jaxtricks.lab.report import hardware


def main() -> None:
    """Print the tables."""
    heading = f"{hardware()}; {amp.ROUNDS} rounds in turn, medians"
    common.publish([amp.table(), amp.build_table(), recompute.table()], heading)
    print()
    common.publish(
        optimizers.tables(), optimizers.heading("python -m benchmarks")
    )


if __name__ == "__main__":
    main()
