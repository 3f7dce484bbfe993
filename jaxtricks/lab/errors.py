"""The error that ends a command. Imports no jax."""

from jaxtricks._table import printable


class UserError(Exception):
    """One sentence for the person at the command line: what is wrong and what to do; exit code 2."""

    def __init__(self, sentence: str):
        # It may quote names and values from files of others, line breaks and terminal codes included.
        super().__init__(printable(sentence))
