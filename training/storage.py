"""What a file system answers, in one line."""

from configs.schema import BadInput


class NotSaved(BadInput):
    """Something that has to last could not be written."""

    exit_code = 5


def brief(error: BaseException) -> str:
    """An exception's first line, or else its name."""
    return (str(error).splitlines() or [''])[0][:300] or type(error).__name__
