"""What must be equal for a fair comparison: which data, which simulator and score, where results go."""

import sys


class UserError(Exception):
    """Bad input. Its message is the one line the user sees: the value, the limit, the way out."""


def tell(main, *args) -> None:
    """main(*args), with bad input told in one line and exit code 2."""
    try:
        main(*args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
