"""What must be equal for a fair comparison: which data, which simulator and score, where results go."""

import os
import sys

if os.name == "nt":
    raise SystemExit("error: runs on Linux and macOS (signals, locks and folder syncs are theirs); on Windows, use WSL")


class UserError(Exception):
    """Bad input. Its message is the one line the user sees: the value, the limit, the way out."""


def _tell_interrupt(kind, error, trace):
    """Ctrl-C before a script's own signal handling stands, as during the imports: no traceback."""
    if kind is KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _tell_interrupt
