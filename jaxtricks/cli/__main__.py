"""`python -m jaxtricks.cli` is `jaxtricks`."""

from jaxtricks.cli import main

main()
