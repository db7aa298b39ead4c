"""The errors a user can cause or meet, each with the exit code that the scripts end with.

A message reads *where: what is wrong; what to do*, on one line. Everything that is not one of these is a bug
in this program and ends with exit code 1.
"""


class LdmError(ValueError):
    """Base of all errors that are the user's to fix: one line of words, no traceback."""

    exit_code = 2


class SettingError(LdmError):
    """A bad flag, value, prompt or configuration."""

    exit_code = 2


class DataError(LdmError):
    """Bad input data: an image, a prompt file, a shard, a data set."""

    exit_code = 3


class ModelError(LdmError):
    """A bad model file: missing, torn, unsafe, or one that does not fit."""

    exit_code = 4


class MachineError(LdmError):
    """The machine refuses: disk full, folder read-only, out of memory, no such device."""

    exit_code = 5


class NotFiniteError(LdmError):
    """Numbers became infinite or not a number."""

    exit_code = 6
