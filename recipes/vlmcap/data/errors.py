"""The error of whatever is wrong with data. Imports nothing heavy: command lines are answered with it."""

from vlmcap.errors import UserError


class DataError(UserError):
    """The data cannot be built or used as asked. The message names the file or dataset, the value and the fix."""
