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

# The floors of the house (docs/design.md): a file imports only from floors below its own, or from its own room.
FLOORS = {
    "errors": 1,
    "shard": 1,
    "tensors": 1,
    "version": 2,  # errors say which version is needed
    "ranks": 2,
    "files": 3,
    "rules": 3,
    "weights": 4,
    "averages": 5,
    "exchange": 6,
    "saved": 6,
    "evaluation": 7,
    "formats": 7,
    "averager": 8,
    "commands": 8,
    "": 9,  # sharded_avg/__init__.py
    "__main__": 9,
    "integration": 9,
    "benchmark": 10,
    "lightning": 10,
}
# Rooms whose __init__.py says what they are and no more, so that an import of one file does not drag in the others.
ROOMS = ("averages", "commands", "evaluation", "exchange", "files", "formats", "rules", "saved", "weights")
# Rooms that each know one trainer: they use the public names, and what integration.py lists.
INTEGRATIONS = ("lightning",)
# (importer, imported): upward imports inside a function, each with a reason beside it.
LAZY_UPWARD: set[tuple[str, str]] = set()

# Who may import what: an engine's name -> the files that know it.
KNOWN_TO = {
    "deepspeed": {"weights.layouts.zero", "benchmark"},
    "lightning": {"lightning", "benchmark"},
    "pytorch_lightning": {"lightning", "benchmark"},
    "torch.distributed.fsdp._": {"weights.layouts.fsdp1"},
    "torch.distributed.checkpoint": {"saved"},
}

MAX_PUBLIC_NAMES = 28
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
    without = {module for module in modules() if noun_of(module) not in FLOORS}
    assert not without, f"give {sorted(without)} a floor in FLOORS, and a line in docs/design.md"


@pytest.mark.parametrize("module", [*ROOMS, "weights.layouts", "saved.folder", "commands.checkup", "commands.sums"])
def test_folders_have_no_code_of_their_own(module: str) -> None:
    assert not [node for node in modules()[module].body if not isinstance(node, ast.Expr)]


def test_imports_point_down() -> None:
    """Files of one room may import each other; that they do not in a circle, see below."""
    upward = [
        f"{module or '__init__'} (floor {FLOORS[here]}) imports {imported} (floor {FLOORS[there]})"
        for module in modules()
        for imported in own_imports(module)
        if (here := noun_of(module)) in FLOORS and (there := noun_of(imported)) in FLOORS and here != there
        if FLOORS[there] >= FLOORS[here] and (module, imported) not in LAZY_UPWARD
    ]
    assert not upward, "\n".join(upward)


@pytest.mark.parametrize("room", INTEGRATIONS)
def test_integrations_use_public_names_and_the_list(room: str) -> None:
    imported = {name for module in modules() if noun_of(module) == room for name in own_imports(module)}
    assert {name for name in imported if noun_of(name) != room} <= {"", "integration"}


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


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@cache
def private_names_of(room: str) -> set[str]:
    """What the files of a room define with a leading underscore: functions, classes, constants, attributes."""
    found: set[str] = set()
    for module in modules():
        if module.partition(".")[0] != room:
            continue
        for node in ast.walk(modules()[module]):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return set(filter(private, found))


@pytest.mark.parametrize("module", modules())
def test_no_room_reaches_into_anothers_underscore_names(module: str) -> None:
    own = module.partition(".")[0]
    imported = [
        name
        for name in imported_by(module)
        if name.startswith("sharded_avg.") and name.split(".")[1] != own and private(name.rpartition(".")[2])
    ]
    rooms = {other.partition(".")[0] for other in modules()} - {own}
    elsewhere = set().union(*(private_names_of(room) for room in rooms)) - private_names_of(own)
    reached = [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(modules()[module])
        if isinstance(node, ast.Attribute) and node.attr in elsewhere
    ]
    assert not imported + reached


# What communicates in torch.distributed: called in ranks/ alone, where it is bounded and no rank leaves in the middle.
COMMUNICATES = re.compile(r"all_|broadcast|reduce|gather|scatter|send|i?recv|isend|barrier|batch_isend|monitored")
MAKES_GROUPS = {"weights.layouts.dtensor"}  # a mesh's own ranks, at construction


def test_only_ranks_communicates() -> None:
    strangers = [
        f"{module}:{node.lineno} {ast.unparse(node)}"
        for module in modules()
        if noun_of(module) not in ("ranks", "benchmark")
        for node in ast.walk(modules()[module])
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("dist", "torch.distributed")
        if COMMUNICATES.match(node.attr) or (node.attr == "new_group" and module not in MAKES_GROUPS)
    ]
    assert not strangers, "\n".join(strangers)


# What makes a function's failure everybody's; the last two are made of the others.
TOGETHER = {"agree", "all_or_none", "decided", "gather_objects", "rendezvous", "traffic"}


def test_collective_functions_go_through_the_mechanism() -> None:
    """A function that says "Collective" is made of what ranks/ has for that, or calls one that is."""
    collective = {
        f"{module}.{node.name}": node
        for module in modules()
        if noun_of(module) not in ("ranks", "benchmark", *INTEGRATIONS)  # which call public methods
        for node in ast.walk(modules()[module])
        if isinstance(node, ast.FunctionDef) and (ast.get_docstring(node) or "").startswith("Collective")
    }
    names = {node.name for node in collective.values()}
    without = [
        name
        for name, node in collective.items()
        if not used_in(node) & (TOGETHER | (names - {node.name}))
        and not is_abstract(node)
        and "Traffic" not in ast.unparse(node.args)  # a part of what its caller sends
    ]
    assert len(collective) > 40
    assert not without, f"{without} are collective, and fail on one rank alone: see docs/design.md"


def used_in(node: ast.FunctionDef) -> set[str]:
    """The names of what a function calls, or hands over to be called; a method of its own name counts."""
    found = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
    found |= {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}
    calls_namesake = any(
        isinstance(child, ast.Call) and ast.unparse(child.func).rpartition(".")[2] == node.name
        for child in ast.walk(node)
    )
    return found | ({"agree"} if calls_namesake else set())


def is_abstract(node: ast.FunctionDef) -> bool:
    return all(isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) for line in node.body)


def test_the_design_page_says_who_uses_whom() -> None:
    """The table of rooms in docs/design.md, against the imports."""
    rows = re.findall(
        r"^\| `(\w+)(?:\.py|/)` \|.*\| ([^|]+) \|$", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE
    )
    told = {room: set(re.findall(r"\w+", uses)) for room, uses in rows}
    found: dict[str, set[str]] = {room: set() for room in FLOORS}
    for module in modules():
        room = module.partition(".")[0]
        found[room] |= {imported.partition(".")[0] or "__init__" for imported in own_imports(module)} - {room}
    silent = {"", "__main__"}  # the public names come from everywhere
    assert told == {room: uses - {"version"} for room, uses in found.items() if room not in {*silent, "version"}}


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
        for node in ast.walk(modules()[""])
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
    }
    others = {"collector_paused", "require_torch", "exit_if_started"}  # deleted there, or imported where it fails only
    assert imported - others == set(names)
    assert not [name for name in others if hasattr(sharded_avg, name)]
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
