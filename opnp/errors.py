"""Exceptions that mean: something outside the program is at fault."""

__all__ = ["InputError", "MissingError", "UnavailableError"]


class InputError(ValueError):
    """Bad input, told in one sentence that names the file or parameter and the way out."""


class UnavailableError(InputError):
    """Something that is elsewhere could not be had now; trying again may help."""


class MissingError(InputError):
    """Files of the user's that are not where the parameters say."""
