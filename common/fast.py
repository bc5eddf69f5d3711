"""Stand-in until the fast forms land."""


def on_cpu(module, compile=False):
    return module
