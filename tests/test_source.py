"""Rules that every script keeps: marked copies, cited keys, fields that are read, a common/ without methods."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from mark_copies import definitions

ROOT = Path(__file__).resolve().parent.parent
# The last is that of EDM.
HOMES = [ROOT / f"{name}.py" for name in ("dawm_td3bc", "dawm_iql", "dwm_baseline", "baselines/synther")]
OTHERS = [*ROOT.glob("*.py"), *(ROOT / "baselines").glob("[a-z]*.py"), *(ROOT / "variants").glob("[a-z]*.py")]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
# A fork that nobody has added to git is left alone.
SCRIPTS = HOMES + sorted(x for x in OTHERS if x not in HOMES and (not TRACKED or str(x.relative_to(ROOT)) in TRACKED))
COMMON = sorted((ROOT / "common").glob("*.py"))
SECTIONS = ["1. Imports", "2. Data", "3. World model", "4. Inverse dynamics", "5. Synthesis", "6. Agent", "7. "]


def marked_definitions(path: Path) -> dict[str, tuple[str, str]]:
    """Top-level functions and classes: name -> (source, the comment line above it)."""
    lines = path.read_text().splitlines()
    return {name: (source, lines[first - 1]) for name, (first, source) in definitions(path.read_text()).items()}


def copy_faults(scripts: dict[str, dict[str, tuple[str, str]]]) -> list[str]:
    """What breaks the rule of copies: {script: its definitions}, homes first. A name's home is the first with it."""
    homes, faults = {}, []
    for script, found in scripts.items():
        for name, (source, marker) in found.items():
            home = homes.setdefault(name, script)
            same = source == scripts[home][name][0]
            if home == script:
                if marker.startswith(("# Copied from", "# Adapted from")):
                    faults.append(f"{name} in {script} is marked and has no home before it")
            elif marker == f"# Copied from {home}":
                if not same:
                    faults.append(f"{name} in {script} is marked Copied and differs")
            elif re.fullmatch(rf"# Adapted from {re.escape(home)}: .+", marker):
                if same:
                    faults.append(f"{name} in {script} is marked Adapted and is identical")
            else:
                faults.append(f"{name} in {script} has a twin in {home} and no marker that says so")
    return sorted(faults)


def test_copies():
    assert copy_faults({str(path.relative_to(ROOT)): marked_definitions(path) for path in SCRIPTS}) == []


def test_the_copy_rule_catches_each_fault():
    home = {name: (f"def {name}(): 1", "") for name in "abcdef"}
    good = {
        "a": ("def a(): 1", "# Copied from x.py"),
        "b": ("def b(): 2", "# Adapted from x.py: why"),
        "new": ("def new(): 3", ""),
    }
    assert copy_faults({"x.py": home, "y.py": good}) == []
    bad = {
        "a": ("def a(): 2", "# Copied from x.py"),
        "b": ("def b(): 1", "# Adapted from x.py: why"),
        "c": ("def c(): 1", ""),
        "d": ("def d(): 1", "# Copied from z.py"),
        "e": ("def e(): 2", "# Adapted from x.py"),
        "new": ("def new(): 3", "# Copied from x.py"),
    }
    assert [fault.split()[0] for fault in copy_faults({"x.py": home, "y.py": bad})] == ["a", "b", "c", "d", "e", "new"]


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
