"""What stops a run that was asked for properly."""


class StoppedError(RuntimeError):
    """The run cannot go on, and what it had is kept. ``train.py`` prints it as one line and exits
    with 1."""
