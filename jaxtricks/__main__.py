"""`python -m jaxtricks` is `jaxtricks`."""

from jaxtricks.lab.cli import main

main()
