"""What bad input raises. Both are one sentence: the value, what was expected, what to do."""


class InputError(ValueError):
    """A value that came from outside is wrong; ``train.py`` prints it in one line and exits with 2."""


class MissingLibraryError(InputError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the library {library}, which is not installed: "
            f"pip install 'sparsegrow[{extra}]'"
        )
