"""The one error class for what a user can put right."""


class UserError(Exception):
    """A mistake of the user's: the message is one line that says what to do. The command line exits with status 2."""
