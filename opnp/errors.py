"""The one exception that means: the input is at fault, not the program."""

__all__ = ["InputError"]


class InputError(ValueError):
    """Bad input, told in one sentence that names the file or parameter and the way out."""
