"""`python -m jaxtricks` is `jaxtricks`."""

from jaxtricks.cli import main

main()
