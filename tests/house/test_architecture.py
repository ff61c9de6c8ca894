"""The plan of the house, as docs/architecture.md lists it: arrows point down, heavy packages stay in their folders."""

import ast
import graphlib
import re
import subprocess
import sys

import pytest

import fedspallm_appfl as face
from fedspallm_appfl.settings import schema
from helpers.paths import ROOT

PACKAGE = ROOT / "src" / "fedspallm_appfl"
PAGE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
FOLDERS = re.findall(r"^\| `([\w/]+)` \|", PAGE, re.MULTILINE)  # from the top down
MAY_IMPORT = {  # whole folders; who else imports one of these is wrong
    "torch": None,  # everywhere but in what has to be quick, see below
    "transformers": {"models", "recovery", "reports", "texts", "globus/server", "runs", "study", "estimates", "api"},
    "appfl": {"adaptors", "globus/server", "globus/site"},
    "datasets": {"texts"},
    "lm_eval": {"models"},
    "mpi4py": {"adaptors", "runs"},
    "globus_compute_sdk": {"globus/server"},
    "proxystore": {"globus/store"},
    "boto3": {"globus/store"},
    "redis": {"globus/store"},
    "mlflow": {"reports"},
    "wandb": {"reports"},
    "requests": {"globus/store", "globus/server"},
}
FILES = {file.relative_to(PACKAGE).with_suffix("").as_posix(): file for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text("utf-8")) for name, file in FILES.items()}


def room(name):
    """The row of the page that a file belongs to: the longest folder that holds it, or the file itself."""
    name = name.removesuffix("/__init__")
    return max((one for one in FOLDERS if name == one or name.startswith(f"{one}/")), key=len, default=None)


def floor(name):
    return FOLDERS.index(room(name))


def imports(name):
    """(line, absolute dotted name, whether at the top of the file) of everything that a file imports."""
    top = set(TREES[name].body)
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}", node in top) for alias in node.names)


def file_of(dotted):
    """The file of this package that a dotted name stands for or stands in; None for another package's."""
    root, *parts = dotted.split(".")
    if root != PACKAGE.name:
        return None
    options = ["/".join([*parts[:size], *end]) for size in range(len(parts), -1, -1) for end in ([], ["__init__"])]
    return next(option for option in options if option in FILES)


def inner(name, only_top=False):
    """Files of this package that a file imports."""
    return {file_of(dotted) for _, dotted, top in imports(name) if top or not only_top} - {None, "__init__"}


def test_every_file_has_a_room_on_the_page():
    assert [name for name in FILES if name != "__init__" and room(name) is None] == []
    assert [one for one in FOLDERS if not any(room(name) == one for name in FILES)] == []


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__"])
def test_arrows_point_down(name):
    up = [other for other in inner(name) if floor(other) > floor(name)]
    assert up == []


def test_no_import_goes_round_in_a_circle():
    graphlib.TopologicalSorter({name: inner(name, only_top=True) - {name} for name in FILES}).prepare()


def test_heavy_packages_stay_in_their_folders():
    found = [
        f"{name}.py:{line}: {dotted}"
        for name in FILES
        for line, dotted, _ in imports(name)
        if (allowed := MAY_IMPORT.get(dotted.split(".")[0])) and room(name) not in allowed
    ]
    assert found == []


def test_rooms_are_small():
    top = [file for file in PACKAGE.iterdir() if file.is_file()]
    assert len(top) <= 8
    folders = {file.parent for file in FILES.values()} - {PACKAGE}
    assert {folder.name: size for folder in folders if (size := len([*folder.glob("*.py")])) > 12} == {}


def reached(*names, only_top=False):
    """All files that are imported with some, at whatever place in a file."""
    found, left = set(), list(names)
    while left:
        found.add(name := left.pop())
        left += inner(name, only_top) - found
    return found


def test_validate_estimate_and_site_need_no_other_heavy_packages_than_transformers():
    """Importing APPFL takes seconds. What the others import is not gone through for garbage, before or after."""
    code = """
import gc, sys
from fedspallm_appfl.cli import main
assert main(["validate", "configs/demo.yaml"]) == main(["estimate", "configs/demo.yaml"]) == 0
assert main(["site", "examples/globus/site.yaml"]) in (0, 2)
heavy = {"appfl", "datasets", "globus_compute_sdk", "mpi4py", "matplotlib", "torchvision", "tensorflow", "wandb"}
print(sorted(heavy & set(sys.modules)), gc.isenabled(), gc.get_freeze_count() > 100_000)
"""
    assert run_python(code).splitlines()[-1] == "[] True True"


def test_run_says_something_before_it_imports_anything_heavy():
    code = """
import sys
from fedspallm_appfl.cli import main

class Ended(Exception):
    pass

class First:
    def write(self, text):
        heavy = {"torch", "transformers", "numpy", "appfl"} & set(sys.modules)
        sys.__stdout__.write(f"{text.split(':')[0]} {heavy or 'light'}")
        raise Ended

    def flush(self):
        pass

    def isatty(self):
        return False

sys.stdout = First()
try:
    main(["run", "configs/demo.yaml", "run_dir=none"])
except Ended:
    pass
"""
    assert run_python(code) == f"fedspallm-appfl {face.__version__} light"


def test_the_face_needs_neither_torch_nor_yaml_until_it_is_used():
    code = "import sys, fedspallm_appfl; print({'torch', 'yaml', 'rich', 'transformers'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


@pytest.mark.parametrize(("given", "kept"), [("", "1"), ("os.environ[name] = '0'; ", "0")])
def test_importing_it_asks_torch_for_huge_pages_unless_the_environment_says_otherwise(given, kept):
    code = f"import os; name = 'THP_MEM_ALLOC_ENABLE'; os.environ.pop(name, None); {given}"
    assert run_python(f"{code}import fedspallm_appfl; print(os.environ[name])").strip() == kept


@pytest.mark.parametrize(
    ("given", "kept"), [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_importing_it_lets_idle_threads_sleep_soon_unless_the_environment_says_otherwise(given, kept):
    code = "import os; [os.environ.pop(name, None) for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')]; "
    code += f"os.environ.update({given}); import fedspallm_appfl; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert run_python(code).strip() == kept


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_face_offers_what_type_checkers_see():
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    [checking] = [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    seen = {
        (node.module.removeprefix(f"{PACKAGE.name}."), alias.name) for node in checking.body for alias in node.names
    }
    assert seen == {(module, name) for module, names in face._WHERE.items() for name in names}


NAMES = {*schema.ALGORITHMS, *schema.PRUNERS}


def test_nobody_compares_the_name_of_an_algorithm_or_a_pruner():
    """What follows from a choice is a fact of the object."""
    found = [
        f"{name}:{node.lineno}: {ast.unparse(node)}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare | ast.match_case)
        and {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)} & NAMES
    ]
    assert found == []


def test_settings_need_no_torch():
    found = reached(*(name for name in FILES if name.startswith("settings/")))
    heavy = [f"{name}: {dotted}" for name in found for _, dotted, _ in imports(name) if dotted.split(".")[0] == "torch"]
    assert heavy == []


def prints(tree):
    return [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"]


def test_nothing_prints_but_the_command_line_and_a_rank_that_aborts():
    [abort] = [node for node in ast.walk(TREES["runs/mpi"]) if getattr(node, "name", "") == "abort_on_failure"]
    allowed = {"runs/mpi": prints(abort)}
    found = {name: prints(tree) for name, tree in TREES.items() if not name.startswith("cli") and prints(tree)}
    assert {name: lines for name, lines in found.items() if lines != allowed.get(name)} == {}


def test_no_except_is_bare():
    assert [
        f"{name}.py:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ] == []
