"""Prints every table; `python -m tests.bench.optimizers` prints that of the optimizers alone."""

from jaxtricks.lab.report import hardware

from tests.bench import amp, common, optimizers, recompute


def main() -> None:
    """Print the tables."""
    heading = f"{hardware()}; {amp.ROUNDS} rounds in turn, medians"
    common.publish([amp.table(), amp.build_table(), recompute.table()], heading)
    print()
    common.publish(optimizers.tables(), optimizers.heading("python -m tests.bench"))


if __name__ == "__main__":
    main()
