"""Errors that users meet: each says what was given, what was expected and what to do."""

from __future__ import annotations


class DwmError(Exception):
    """Base of every error that dwm_fast raises on purpose; the command line prints it without a traceback."""


class InputError(DwmError, ValueError):
    """An argument has the wrong value, shape, dtype or device."""


class DataError(DwmError):
    """A data set, split list or checkpoint is missing, incomplete or of another kind than expected."""


class BackendUnavailable(DwmError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


class MaskFileError(DwmError):
    """A mask file is truncated, corrupted, of another format version, or belongs to another backbone."""


class Unsupported(Exception):
    """A backend's word to its operation that it does not know these tensors: the reference computes them."""
