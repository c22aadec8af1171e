"""The one base of the errors that a user can mend."""


class UserError(ValueError):
    """Something is not as it must be. The message names the file or the setting, the value, and the mend.

    Scripts and recipes end with the message instead of a traceback, see `vlmcap.arguments.run_main`.
    """
