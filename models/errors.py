"""The one error class for what a user can put right, and how a command line shows it."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake of the user's: the message is one line that says what to do. The command line exits with status 2."""


class BadSample(UserError):
    """One sample of many cannot be used: a damaged picture, a missing caption. What reads many may leave it out."""


def run_command(action: Callable[[], None]) -> None:
    """Run a command line: a UserError is one line on stderr and exit status 2, Ctrl-C exit status 130."""
    try:
        action()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
