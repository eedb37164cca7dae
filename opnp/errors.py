"""Exceptions that mean: something outside the program is at fault."""

__all__ = ["InputError", "UnavailableError"]


class InputError(ValueError):
    """Bad input, told in one sentence that names the file or parameter and the way out."""


class UnavailableError(InputError):
    """Something that is elsewhere could not be had now; trying again may help."""
