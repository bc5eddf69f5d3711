"""What separates two scripts, definition by definition: python experiments/diffs.py dawm_td3bc.py dawm_iql.py"""

import ast
import difflib
import sys
from pathlib import Path


def definitions(path: Path) -> dict[str, list[str]]:
    """Top-level functions, classes and constants: name -> its lines, without the marker above them."""
    text, found = path.read_text(), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name, first = node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])
        elif isinstance(node, ast.Assign):
            name, first = ast.unparse(node.targets[0]), node.lineno
        else:
            continue
        found[name] = text.splitlines()[first - 1 : node.end_lineno]
    return found


def main(left: str, right: str) -> None:
    a, b = definitions(Path(left)), definitions(Path(right))
    same = [name for name in a if a[name] == b.get(name)]
    print(f"identical ({sum(len(a[name]) for name in same)} lines): {', '.join(same)}")
    print(f"only in {left}: {', '.join(name for name in a if name not in b)}")
    print(f"only in {right}: {', '.join(name for name in b if name not in a)}")
    for name in a:
        if name in b and name not in same:
            print(f"\n{name}", *list(difflib.unified_diff(a[name], b[name], lineterm="", n=1))[2:], sep="\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("error: give two scripts: python experiments/diffs.py dawm_td3bc.py dawm_iql.py")
    main(*sys.argv[1:])
