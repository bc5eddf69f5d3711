"""Write above each top-level definition of a fork whether its home has the same: python tests/mark_copies.py my.py

A definition's home is the first script that has its name. `# Copied from HOME` where the two are equal to the letter,
`# Adapted from HOME: FILL IN what differs` where not; a reason that stands there stays. Run it again after each change.
"""

import ast
import itertools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST = ["dawm_td3bc.py", "dawm_iql.py", "dwm_baseline.py", "baselines/synther.py"]
MARKER = re.compile(r"# (Copied|Adapted) from \S+?(: .*)?$")


def definitions(text: str) -> dict[str, tuple[int, str]]:
    """Top-level functions and classes but Args and main: name -> (first line from 0, source), decorators included."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in ("Args", "main"):
            first = min([node.lineno, *(x.lineno for x in node.decorator_list)]) - 1
            found[node.name] = first, "\n".join(lines[first : node.end_lineno])
    return found


def homes(paths) -> dict[str, tuple[str, str]]:
    """name -> (the first of these scripts that has it, source there)."""
    found = {}
    for path in paths:
        for name, (_, source) in definitions(path.read_text()).items():
            found.setdefault(name, (path.relative_to(ROOT).as_posix(), source))
    return found


def marked(text: str, homes: dict[str, tuple[str, str]]) -> str:
    lines = text.splitlines()
    for name, (first, source) in reversed(definitions(text).items()):
        old = MARKER.match(lines[first - 1])
        new = []
        if name in homes:
            home, there = homes[name]
            why = (old and old[2]) or ": FILL IN what differs"
            new = [f"# Copied from {home}" if source == there else f"# Adapted from {home}{why}"]
        lines[first - bool(old) : first] = new
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    scripts = [*(ROOT / name for name in FIRST), *sorted([*ROOT.glob("baselines/*.py"), *ROOT.glob("variants/*.py")])]
    for argument in sys.argv[1:]:
        path = Path(argument)
        before = itertools.takewhile(lambda script: script != path.resolve(), scripts)
        path.write_text(marked(path.read_text(), homes(before)))
        text = path.read_text()
        print(f"{path}: {text.count('# Copied from')} copied, {text.count('# Adapted from')} adapted")
