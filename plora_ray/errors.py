"""The errors a user of the system can meet. Each message is one line that says what to change."""

from __future__ import annotations


class PloraError(Exception):
    """Base of all errors that are meant for a user's eyes; `exit_code` is what a command ends with."""

    exit_code = 1


class ConfigError(PloraError):
    """A setting is unknown, malformed or contradicts another."""

    exit_code = 2


class DataError(PloraError):
    """The training rows can't be used as they are: missing, malformed or with labels that training never sees."""


class ModelError(PloraError):
    """The pre-trained model can't be loaded or has no layer to adapt."""


class StoreError(PloraError):
    """The adapter store can't be read or written."""


class CorruptObjectError(StoreError):
    """An object in the store doesn't match its digest or its declared layout."""


class ErasedDuringFit(StoreError):
    """A user left while his adapter was being fitted; the adapter was not stored."""


class InvalidUserId(PloraError):
    """A user id is empty, too long or not text."""
