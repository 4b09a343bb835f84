"""What a user did wrong, told in one line with exit code 2."""

import sys
from collections.abc import Callable

from padd_ds.launcher import launched_rank

EXIT_CODE_USER_ERROR = 2
EXIT_CODE_STOPPED = 75
"""A signal asked the run to stop, and it can be resumed: what sysexits.h calls a temporary failure."""


class UserError(Exception):
    """A mistake that the user can put right.

    The message is one line that names the file or key, the value, the rule and the remedy.
    Raised before any work is done; entry points turn it into exit code 2 without a traceback.
    """


class TrainingDiverged(RuntimeError):
    """A loss or a gradient is not finite; raised on all ranks before the weights change."""


class RolloutFailed(RuntimeError):
    """Rollout servers fail however often they are started again; raised on all ranks."""


class HandoverError(RuntimeError):
    """A model computes something else than it did before it was handed over; raised on all ranks."""


class OneRankError(UserError):
    """A UserError that one rank of several knows of and that rank therefore has to tell."""


def run_cli(main: Callable[[], None]) -> None:
    """Run an entry point; a UserError becomes one line on standard error, from rank 0 of several, and exit code 2."""
    try:
        main()
    except UserError as error:
        if launched_rank() in (None, 0) or isinstance(error, OneRankError):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE_USER_ERROR)
