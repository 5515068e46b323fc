"""The one exception that means "you can mend this": shown as a sentence, without a stack trace."""


class UserError(ValueError):
    """A wrong setting, file or model; the message names the culprit, its value and the remedy."""
