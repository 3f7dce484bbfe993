"""The tests; `typecheck` is the run-time type checker they run under (an int is a float, as everywhere)."""

from beartype import BeartypeConf, beartype

typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
