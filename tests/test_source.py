"""Rules that every script keeps: marked copies, cited keys, fields that are read, a common/ without methods."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from mark_copies import FIRST, homes, marked

ROOT = Path(__file__).resolve().parent.parent
HOMES = [ROOT / name for name in FIRST]
OTHERS = [*ROOT.glob("*.py"), *(ROOT / "baselines").glob("[a-z]*.py"), *(ROOT / "variants").glob("[a-z]*.py")]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
# A fork that nobody has added to git is left alone.
SCRIPTS = HOMES + sorted(x for x in OTHERS if x not in HOMES and (not TRACKED or str(x.relative_to(ROOT)) in TRACKED))
COMMON = sorted((ROOT / "common").glob("*.py"))
SECTIONS = ["1. Imports", "2. Data", "3. World model", "4. Inverse dynamics", "5. Synthesis", "6. Agent", "7. "]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_copies_are_marked(script):
    """tests/mark_copies.py would change nothing, and no reason is still to be filled in."""
    text = script.read_text()
    assert marked(text, homes(SCRIPTS[: SCRIPTS.index(script)])) == text and "FILL IN" not in text


@pytest.mark.parametrize(
    "wrong",
    [
        "# Copied from x.py\ndef a():\n    2\n",
        "# Adapted from x.py: why\ndef a():\n    1\n",
        "def a():\n    1\n",
        "# Copied from z.py\ndef a():\n    1\n",
        "# Adapted from x.py\ndef a():\n    2\n",
        "# Copied from x.py\ndef new():\n    3\n",
    ],
)
def test_the_rule_of_copies_catches_each_fault(wrong):
    there = {"a": ("x.py", "def a():\n    1"), "b": ("x.py", "def b():\n    1")}
    right = "# Copied from x.py\ndef a():\n    1\n\n\n# Adapted from x.py: why\ndef b():\n    2\n\n\ndef c():\n    3\n"
    assert marked(right, there) == right and marked(wrong, there) != wrong


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_sections_in_order_keys_in_the_header_and_nothing_runs_at_import(script):
    text = script.read_text()
    banners = re.findall(r"^# (\d\. .+)$", text, flags=re.M)
    assert all(banner.startswith(section) for banner, section in zip(banners, SECTIONS, strict=True))
    last = ast.parse(text).body[-1]
    assert isinstance(last, ast.If) and "__main__" in ast.unparse(last.test)
    header = set(re.findall(r"^\[(\w+)\]", ast.get_docstring(ast.parse(text)), flags=re.M))
    cited = set(re.findall(r"\[([A-Z][A-Z0-9]+)(?: [^\]]*)?\]", text)) - {"KEY"}
    assert header and cited <= header, cited - header


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / "common" / "cli.py"], ids=lambda p: p.name)
def test_every_argument_is_documented_and_read(script):
    lines = script.read_text().splitlines()
    readers = [script, *COMMON] if script in SCRIPTS else [*COMMON, *SCRIPTS]
    text = "".join(path.read_text() for path in readers)
    (args,) = [n for n in ast.parse("\n".join(lines)).body if getattr(n, "name", "") in ("Args", "RunArgs")]
    for field in args.body:
        if not isinstance(field, ast.AnnAssign):
            continue
        name, above = field.target.id, lines[field.lineno - 2].strip()
        assert "  # " in lines[field.end_lineno - 1] or (above.startswith("# ") and "----" not in above), name
        assert name in ("laptop", "preset") or re.search(rf"args\.{name}\b", text), f"{name} is never read"


DOWNWARDS = ["files", "cli", "stages", "run", "fast", "evaluation", "data", "export"]


def imports_of(path: Path) -> set[str]:
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
    return {f"{n.module}.{x.name}" if isinstance(n, ast.ImportFrom) else x.name for n in nodes for x in n.names}


@pytest.mark.parametrize("path", COMMON, ids=lambda p: p.name)
def test_common_holds_no_method_and_imports_downwards(path):
    own = {name.split(".")[1] for name in imports_of(path) if name.startswith("common.")} - {"UserError"}
    assert not own or own <= set(DOWNWARDS[: DOWNWARDS.index(path.stem)]), own
    assert not {name for name in imports_of(path) if name.startswith("torch.optim")}
    assert path.stem == "fast" or not re.search(r"\bnn\.(Linear|Conv1d|Sequential)", path.read_text())


@pytest.mark.parametrize("path", [*SCRIPTS, *COMMON], ids=lambda p: p.name)
def test_no_code_of_a_script_is_imported(path):
    """What a script shares with another stands in it as a marked copy."""
    others = {"baselines", "variants", "experiments", "benchmarks", "tests", *(script.stem for script in SCRIPTS)}
    assert not {name.split(".")[0] for name in imports_of(path)} & others


def test_no_pickle_is_ever_loaded():
    for path in [*SCRIPTS, *COMMON, *(ROOT / "local_datasets").glob("*.py")]:
        text = path.read_text()
        assert not re.search(r"\bimport pickle|pickle\.load|allow_pickle=True|weights_only=False", text), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, (path, call)
