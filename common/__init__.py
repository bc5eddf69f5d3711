"""What must be equal for a fair comparison: which data, which simulator and score, where results go."""

import os

if os.name == "nt":
    raise SystemExit("error: runs on Linux and macOS (signals, locks and folder syncs are theirs); on Windows, use WSL")


class UserError(Exception):
    """Bad input. Its message is the one line the user sees: the value, the limit, the way out."""
