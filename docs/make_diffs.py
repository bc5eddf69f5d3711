"""Write docs/diffs.md: what separates two scripts, from their sources.

python docs/make_diffs.py
"""

import ast
import difflib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [
    ("dawm_td3bc.py", "dawm_iql.py", "The same synthetic transitions, another learner."),
    (
        "dawm_td3bc.py",
        "joint_td3bc.py",
        "The same method without inverse dynamics: the world model generates the actions too.",
    ),
    ("dawm_td3bc.py", "dwm_baseline.py", "The same world model; no action is filled in, the critics' target changes."),
    (
        "dawm_td3bc.py",
        "ssorl_baseline.py",
        "The same inverse dynamics; states and rewards are real, actions are hidden.",
    ),
    ("dawm_iql.py", "dwm_baseline.py", "As above, for IQL."),
    (
        "dawm_td3bc.py",
        "dd_baseline.py",
        "States alone are generated, at every environment step; no transitions, no agent.",
    ),
]


def parts(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Top-level definitions and constants: name -> (section, source lines without the marker above them)."""
    text = path.read_text()
    lines, found = text.splitlines(), {}
    banners = [(i, line[2:].rstrip(".")) for i, line in enumerate(lines) if re.match(r"# \d\. ", line)]
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name, first = node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])
        elif isinstance(node, ast.Assign):
            name, first = node.targets[0].id, node.lineno
        else:
            continue
        section = [title for i, title in banners if i < node.lineno][-1]
        found[name] = (section, lines[first - 1 : node.end_lineno])
    return found


def comparison(left: str, right: str, words: str) -> str:
    a, b = parts(ROOT / left), parts(ROOT / right)
    same = [name for name in a if name in b and a[name][1] == b[name][1]]
    changed = [name for name in a if name in b and a[name][1] != b[name][1]]
    only_a, only_b = [n for n in a if n not in b], [n for n in b if n not in a]
    count = sum(len(b[name][1]) for name in same)
    out = [f"## {left} → {right}", "", words, ""]
    out += [f"- Identical to the letter ({count} lines): {_names(same)}"]
    out += [f"- Only in {left}: {_names(only_a)}", f"- Only in {right}: {_names(only_b)}"]
    out += [f"- Changed: {_names(changed)}", ""]
    for name in changed:
        diff = difflib.unified_diff(a[name][1], b[name][1], lineterm="", n=1)
        out += [f"### {name} ({b[name][0].split(':')[0]})", "", "```diff", *list(diff)[2:], "```", ""]
    return "\n".join(out)


def _names(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "nothing"


def page() -> str:
    head = [
        "# What differs",
        "",
        "Made from the sources by `python docs/make_diffs.py`; a test keeps it true. A definition marked",
        "`# Copied from` is identical to the letter and not shown; new definitions are read in their script.",
        "",
    ]
    return "\n".join(head) + "\n" + "\n".join(comparison(*pair) for pair in PAIRS)


if __name__ == "__main__":
    (ROOT / "docs" / "diffs.md").write_text(page())
