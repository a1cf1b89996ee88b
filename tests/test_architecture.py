"""docs/architecture.md says what the code does, and the code keeps its own rules."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE, CLI = ROOT / "maskpack", ROOT / "cli" / "maskpack_cli"
FILES = sorted([*PACKAGE.rglob("*.py"), *CLI.rglob("*.py")])
LONGEST = 600  # lines of a file
# options and progress are made of these
WITHOUT_TORCH = {"maskpack.errors", "maskpack.preprocess", "maskpack.training.config", "maskpack.training.progress"}
LAZY = {"import maskpack", "from maskpack import training", "from maskpack import lab, training"}
KNOWN_UNREQUIRED = {"PIL", "datasets", "huggingface_hub", "rich", "yaml"}  # imported plainly inside a function

Imports = Iterator[tuple[str, str, bool]]  # (what, kind: "own" or "other", at module level)


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def stage_of(path: Path) -> str:
    """The folder, or the file's own name if it is in none."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def only_for_types(tree: ast.Module) -> set[ast.AST]:
    """The nodes below `if TYPE_CHECKING:`."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return {inner for block in blocks for one in block.body for inner in ast.walk(one)}


def inside_functions(tree: ast.Module) -> set[ast.AST]:
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    return {inner for function in functions for inner in ast.walk(function)}


def imports_of(path: Path) -> Imports:
    """Every import of a file of the package, those for types and those by `require` included."""
    tree = tree_of(path)
    late = inside_functions(tree) | only_for_types(tree)
    place = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = [*place[: -node.level], *(node.module or "").split(".")]
            yield next(part for part in [*target, node.names[0].name] if part), "own", node not in late
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).split(".")[0], "other", node not in late
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], "other", node not in late
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "require":
            assert isinstance(node.args[0], ast.Constant)
            yield str(node.args[0].value).split(".")[0], "other", False


def table() -> dict[str, tuple[set[str], set[str], set[str]]]:
    """The import table of docs/architecture.md: stage -> (stages, libraries, libraries inside functions only)."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    cells = [[set(re.findall(r"\w+", cell)) for cell in row[1:]] for row in rows]
    return {row[0]: (own, libraries, late) for row, (own, libraries, late) in zip(rows, cells, strict=True)}


def test_import_table() -> None:
    found: dict[str, tuple[set[str], set[str], set[str]]] = {}
    for path in PACKAGE.rglob("*.py"):
        stage = stage_of(path)
        if stage in ("__init__", "__main__"):
            continue
        own, libraries, late = found.setdefault(stage, (set(), set(), set()))
        for what, kind, early in imports_of(path):
            if kind == "own" and what != "lazily":  # of the package itself
                own.add(what)
            elif kind == "other" and what not in sys.stdlib_module_names:
                (libraries if early else late).add(what)
    cleaned = {stage: (own - {stage}, one, late - one) for stage, (own, one, late) in found.items()}
    assert cleaned == table()


def test_table_has_no_cycle() -> None:
    order: list[str] = []
    left = {stage: own for stage, (own, _, _) in table().items()}
    while left:
        ready = [stage for stage, own in left.items() if own <= set(order)]
        assert ready, f"a cycle among {sorted(left)}"
        order += ready
        left = {stage: own for stage, own in left.items() if stage not in ready}
    assert order.index("adapter") < order.index("training") < order.index("lab")


def test_loading_needs_no_training() -> None:
    own = {stage: row[0] for stage, row in table().items()}
    reached, found = {"runtime"}, set[str]()
    while reached - found:
        found |= reached
        reached = found | set().union(*(own[stage] for stage in found))
    assert not found & {"training", "importers", "lab"}


def test_single_importers() -> None:
    importers: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for what, _, _ in imports_of(path):
            importers.setdefault(what, set()).add(path.relative_to(PACKAGE).as_posix())
    assert importers["safetensors"] == {"safetensors_io.py"}
    assert {file.split("/")[0] for file in importers["huggingface_hub"]} == {"hub", "network.py"}
    assert "maskpack" not in importers, f"absolute imports of the package in {importers['maskpack']}"
    late = {name for _, _, names in table().values() for name in names}
    required = {
        re.split(r"\W", m)[0] for p in PACKAGE.rglob("*.py") for m in re.findall(r'require\("([\w.]+)"', p.read_text())
    }
    assert late - required <= KNOWN_UNREQUIRED


@pytest.mark.parametrize("path", sorted(CLI.rglob("*.py")), ids=lambda path: path.name)
def test_command_line_imports_late(path: Path) -> None:
    if path.name == "digits_backbone.py":
        return  # copied by the demo and run as the user's own file
    tree = tree_of(path)
    late = inside_functions(tree) | only_for_types(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module).split(".")[0]]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        else:
            continue
        early = {"typer", "rich"} | set(sys.stdlib_module_names)
        if ast.unparse(node) in LAZY or (isinstance(node, ast.ImportFrom) and node.module in WITHOUT_TORCH):
            continue
        assert node in late or set(names) <= early, f"{path.name}:{node.lineno} imports {names} at module level"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_rules_of_a_file(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
    assert path.stem not in ("utils", "util", "helpers", "helper", "common", "misc")
    tree = tree_of(path)
    assert path.name == "__init__.py" or ast.get_docstring(tree), "a file begins with what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "print", "torch.load", "torch.save", "__import__"), called
            assert not called.endswith(".exec_module") or name == "maskpack/backbone/load.py"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            assert not {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} & set(names)


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.name)
def test_what_tests_share_is_in_helpers(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            assert not [name for name in names if name.rpartition(".")[2].startswith("test_")], f"{path.name}: {names}"
