"""Exceptions that the command line shows as a sentence, without a stack trace."""


class UserError(ValueError):
    """A wrong setting, file or model; the message names the culprit, its value and the remedy."""


class Stopped(RuntimeError):
    """The run has stopped between two steps and can go on; the message says why and from where."""

    def __init__(self, message: str, *, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
