"""What bad input raises: one sentence that names the value, what was expected and what to do."""


class InputError(ValueError):
    """A value from outside is wrong. ``train.py`` prints it as one line and exits with 2."""


class MissingLibraryError(InputError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the library {library}, which is not installed: "
            f"pip install 'sparsegrow[{extra}]'"
        )
