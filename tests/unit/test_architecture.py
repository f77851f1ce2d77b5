"""The house rules of docs/design.md that a machine can hold: floors, engines in their own files, sizes, the surface."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import sharded_avg

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sharded_avg"

# A file imports only from floors below its own. A folder that grew out of a file keeps the file's floor.
FLOORS = {
    "errors": 0,
    "version": 0,
    "ranks": 1,
    "averages.history": 1,
    "weights.names": 1,
    "posthoc": 1,
    "rules.base": 1,
    "rules.schedule": 1,
    "shard": 1,
    "files.archive": 1,
    "files.pickles": 1,
    "averages.arguments": 2,
    "exchange.gather": 2,
    "tensors": 2,
    "saved.dcp": 2,
    "saved.manifest": 2,
    "saved.place": 2,
    "files.source": 2,
    "files.stored": 2,
    "weights.layouts.base": 2,
    "averages.store": 3,
    "exchange.swap": 3,
    "files.weight_files": 3,
    "saved.fit": 3,
    "commands.merge": 3,
    "files.dcp_folder": 3,
    "weights.layouts.dtensor": 3,
    "weights.layouts.fsdp1": 3,
    "weights.layouts.replicated": 3,
    "weights.layouts.zero": 3,
    "saved.sources": 4,
    "saved.safe": 4,
    "formats.importers": 4,
    "formats.exporters": 7,
    "files.sinks": 4,
    "saved.from_source": 6,
    "weights.layouts.detect": 4,
    "weights.members": 5,
    "saved.folder": 5,
    "formats.open": 5,
    "saved.items": 6,
    "exchange.summon": 6,
    "evaluation.batch_norm": 6,
    "evaluation.distance": 6,
    "evaluation.finite": 6,
    "weights.aside": 6,
    "weights.write": 7,
    "saved.loading": 7,
    "keeper": 8,
    "commands.consolidate": 7,
    "commands.convert": 8,
    "commands.inspect": 6,
    "averager": 9,
    "": 10,  # sharded_avg/__init__.py
    "benchmark": 11,
    "lightning": 11,
    "commands.cli": 12,
    "__main__": 13,
}
EMPTY = {
    "commands",
    "formats",
    "saved",
    "evaluation",
    "exchange",
    "averages",
    "weights",
    "files",
    "rules",
    "checkpoint",
    "weights.layouts",
}  # rooms whose __init__.py says what they are and no more, so that it has no floor
# (importer, imported): upward imports inside a function, each with a reason beside it.
LAZY_UPWARD: set[tuple[str, str]] = set()

# Who may import what: an engine's name -> the files that know it.
KNOWN_TO = {
    "deepspeed": {"weights.layouts.zero", "benchmark"},
    "lightning": {"lightning", "benchmark"},
    "pytorch_lightning": {"lightning", "benchmark"},
    "torch.distributed.fsdp._": {"weights.layouts.fsdp1"},
    "torch.distributed.checkpoint": {"checkpoint", "saved", "averager", "benchmark", "lightning"},
}

MAX_PUBLIC_NAMES = 20
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400


@cache
def modules() -> dict[str, ast.Module]:
    """Every file of the package under its dotted name; "" is the package itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").removesuffix(".")] = ast.parse(path.read_text(), str(path))
    return found


def path_of(module: str) -> Path:
    base = PACKAGE.joinpath(*module.split(".")) if module else PACKAGE
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def noun_of(module: str) -> str:
    """The entry of FLOORS that the module belongs to: itself, or the folder that it is in."""
    while module not in FLOORS and "." in module:
        module = module.rpartition(".")[0]
    return module


def imported_by(module: str) -> Iterator[str]:
    """Full dotted names of everything that the module imports, wherever in the file the import stands."""
    folder = ["sharded_avg", *module.split(".")] if module else ["sharded_avg"]
    if path_of(module).name != "__init__.py":
        folder = folder[:-1]
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """The modules of this package that the module imports."""
    found = set()
    for name in imported_by(module):
        if name.partition(".")[0] != "sharded_avg":
            continue
        inner = name.partition(".")[2]
        found.add(inner if inner in modules() else inner.rpartition(".")[0])
    return found


def test_every_file_has_a_floor() -> None:
    without = {module for module in modules() if noun_of(module) not in FLOORS} - EMPTY
    assert not without, f"give {sorted(without)} a floor in FLOORS, and a line in docs/design.md"


@pytest.mark.parametrize("module", sorted(EMPTY))
def test_folders_have_no_code_of_their_own(module: str) -> None:
    assert not [node for node in modules()[module].body if not isinstance(node, ast.Expr)]


def test_imports_point_down() -> None:
    """Files of one folder that grew out of one file may import each other; that they do not in a circle, see below."""
    upward = [
        f"{module or '__init__'} (floor {FLOORS[here]}) imports {imported} (floor {FLOORS[there]})"
        for module in modules()
        for imported in own_imports(module)
        if (here := noun_of(module)) in FLOORS and (there := noun_of(imported)) in FLOORS and here != there
        if FLOORS[there] >= FLOORS[here] and (module, imported) not in LAZY_UPWARD
    ]
    assert not upward, "\n".join(upward)


def test_no_import_cycle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for imported in sorted(own_imports(module) & modules().keys()):
                if (module, imported) not in LAZY_UPWARD:
                    visit(imported, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


@pytest.mark.parametrize("engine", KNOWN_TO)
def test_each_engine_is_known_to_its_own_file(engine: str) -> None:
    allowed = KNOWN_TO[engine]
    strangers = [
        f"{module} imports {name}"
        for module in modules()
        for name in imported_by(module)
        if (name == engine or name.startswith(engine if engine.endswith("_") else engine + "."))
        and not any(module == known or module.startswith(known + ".") for known in allowed)
    ]
    assert not strangers, "\n".join(strangers)


def test_import_needs_no_engine() -> None:
    code = (
        "import sys, sharded_avg\n"
        "print(*{name.partition('.')[0] for name in sys.modules} & {'lightning', 'pytorch_lightning', 'deepspeed'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == ""


def test_public_names() -> None:
    names = sharded_avg.__all__
    assert names == sorted(names)
    assert len(names) == len(set(names)) <= MAX_PUBLIC_NAMES
    imported = {
        alias.asname or alias.name
        for node in modules()[""].body
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
    }
    assert imported == set(names)
    assert all(hasattr(sharded_avg, name) for name in names)


def test_changelog_and_version_agree() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == sharded_avg.__version__


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From the first statement after the docstring to the end."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("module", modules())
def test_sizes(module: str) -> None:
    assert len(path_of(module).read_text().splitlines()) <= MAX_FILE_LINES
    functions = [n for n in ast.walk(modules()[module]) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert not [f.name for f in functions if lines_of_code(f) > MAX_FUNCTION_LINES]


@pytest.mark.parametrize("module", modules())
def test_errors_are_the_packages_own(module: str) -> None:
    """No assert without a message, no bare Exception: a reader of either cannot tell what to do."""
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Assert):
            assert node.msg is not None, f"{module}:{node.lineno} asserts without a message"
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            assert node.exc.func.id not in {"Exception", "AssertionError"}, f"{module}:{node.lineno}"
