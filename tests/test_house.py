"""The layout of the code: which files there are, how long they are, what imports what, and that imports do nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {  # name: most lines
    "model": 600, "utils": 500, "datasets": 150, "train": 640, "eval": 400, "detect": 400, "create_data_lists": 280,
}  # fmt: skip
SUPPORT = sorted((ROOT / "support").glob("*.py"))
LONGEST_SUPPORT_FILE, LONGEST_SUPPORT = 400, 4500


def count_lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def imported_modules(path):
    """The names of all modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_seven_scripts_and_no_other_python_file_stand_at_the_top():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_keeps_within_its_budget_of_lines(name):
    assert count_lines(ROOT / f"{name}.py") <= SCRIPTS[name]


def test_support_keeps_within_its_budget_of_lines():
    lengths = {path.name: count_lines(path) for path in SUPPORT}
    assert max(lengths.values()) <= LONGEST_SUPPORT_FILE, lengths
    assert sum(lengths.values()) <= LONGEST_SUPPORT, lengths


@pytest.mark.parametrize("path", SUPPORT, ids=lambda path: path.stem)
def test_support_imports_no_top_level_module(path):
    assert not {name.partition(".")[0] for name in imported_modules(path)} & set(SCRIPTS)


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *SUPPORT], ids=lambda path: path.stem)
def test_the_product_imports_nothing_from_the_tests(path):
    tests = {"tests", *(test.stem for test in (ROOT / "tests").glob("*.py"))}
    assert not {name.partition(".")[0] for name in imported_modules(path)} & tests


def test_importing_a_module_does_nothing(tmp_path):
    modules = [*SCRIPTS, *(f"support.{path.stem}" for path in SUPPORT)]
    code = (
        "import sys, os, torch, importlib\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        "    assert not torch.cuda.is_initialized(), module\n"
        "    assert os.listdir() == [], module"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "PATH": ""},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
