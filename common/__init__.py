"""What must be equal for a fair comparison: which data, which simulator and score, where results go."""


class UserError(Exception):
    """Bad input. Its message is the one line the user sees: the value, the limit, the way out."""
