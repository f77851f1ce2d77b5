"""Every private name of torch, DeepSpeed and Lightning that the package touches, and whether the installed one has it.

The lists are where the names are used: the Notes called internals at the top of the layouts and of
lightning/trainers.py, and the table in docs/design.md. The code is held to them here, and they to what is installed.

    python -m tests.unit.test_third_party      prints all of it: a new release of any of them, judged in a minute

A name exists if its owner has it, or if something in the owner's source defines or assigns it: what an instance gets in
`__init__` no class has. Nothing of DeepSpeed or Lightning is imported for that, only read.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.unit.test_architecture import ROOT, modules, private

# The Notes, and where each owner in them is defined: files or folders of the package that is said first.
NOTES = {
    "weights.layouts.fsdp1": (
        "torch",
        dict.fromkeys(("unit", "handle", "flat", "module"), ("distributed/fsdp", "distributed/utils.py")),
    ),
    "weights.layouts.dtensor": (
        "torch",
        {
            "DTensor": ("distributed/tensor",),
            **dict.fromkeys(("module", "state", "group", "param"), ("distributed/fsdp/_fully_shard",)),
        },
    ),
    "weights.layouts.zero": (
        "deepspeed",
        {
            "engine": ("runtime/engine.py",),
            "ZeRO 1, 2": ("runtime/zero/stage_1_and_2.py",),
            "BF16": ("runtime/bf16_optimizer.py",),
            "FP16": ("runtime/fp16/fused_optimizer.py",),
            "unfused": ("runtime/fp16/unfused_optimizer.py",),
            "ZeRO 3": ("runtime/zero/stage3.py", "runtime/zero/parameter_offload.py"),
            "parameter": ("runtime/zero", "utils"),
            "AutoTP": ("module_inject", "checkpoint/constants.py", "utils/groups.py"),
            "optional": ("runtime",),
        },
    ),
    "lightning.trainers": (
        "lightning",
        dict.fromkeys(("trainer", "loops", "strategy"), ("pytorch", "fabric/strategies")),
    ),
}
# What looks like one, and is Python's, a key in files, or public torch.
NOT_INTERNALS = {"_exit", "_getframe", "_Stop", "_replace", "_extra_state", "register_step_post_hook"}


class Internal(NamedTuple):
    """One name, or several of which one is enough, and where they are listed and defined."""

    listed_in: str  # a module of the package, or "design"
    owner: str
    names: tuple[str, ...]  # alternatives
    where: tuple[str, ...]  # dotted owner, or files and folders inside of `package`
    package: str


def notes() -> Iterator[Internal]:
    """The rows of the Notes called internals: an owner, names with commas between, two spaces, what they are."""
    for module, (package, owners) in NOTES.items():
        text = ast.get_docstring(modules()[module], clean=False) or ""
        note = re.search(r"^\[Note: .* internals\]\n(.*?)(?=^\[Note|\Z)", text, re.MULTILINE | re.DOTALL)
        assert note is not None, f"{module} has no Note of internals"
        owner = ""
        for line in note[1].splitlines():
            row = re.fullmatch(r"    ( {4,}|(\w[\w ,]*?\w) {2,})(\w+(?:(?:, | or )\w+)*)(?:  .*)?", line)
            if row is None:
                assert not line.startswith("    "), f"{module}: not a row of the Note: {line!r}"
                continue
            owner = row[2] or owner
            assert owner in owners, f"{module}: {owner} is not in NOTES"
            for names in row[3].split(", "):
                yield Internal(module, owner, tuple(names.split(" or ")), owners[owner], package)


def of_the_design_page() -> Iterator[Internal]:
    """The rows of the table in docs/design.md."""
    text = (ROOT / "docs" / "design.md").read_text().partition("## Third-party internals")[2].partition("\n## ")[0]
    for owner, names in re.findall(r"^\| `([\w.]+)` \| (`.*`) \|.*\|$", text, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            yield Internal("design", owner, (name,), (owner,), owner.partition(".")[0])


INTERNALS = [*notes(), *of_the_design_page()]


@cache
def defined_in(package: str, where: str) -> frozenset[str]:
    """Names that Python files define or assign, read, not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return frozenset()
    place = Path(spec.origin).parent / where
    found: set[str] = set()
    for file in [place] if place.suffix else sorted(place.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())) if file.exists() else ():
            found |= set(_defined_by(node))
    return frozenset(found)


def _defined_by(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith(("setattr", "register_buffer")):
        yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
        yield node.value  # names that a wrapper is told, and slots


def resolved(dotted: str) -> Any:
    """The object of that name, its module imported."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ImportError(dotted)


def exists(internal: Internal, name: str) -> bool:
    """Whether the installed package has it."""
    if internal.listed_in != "design":
        return any(name in defined_in(internal.package, where) for where in internal.where)
    (dotted,) = internal.where
    folder = dotted.partition(".")[2].replace(".", "/")
    if internal.package != "torch":
        return name in defined_in(internal.package, f"{folder}.py")
    owner = resolved(dotted)
    if hasattr(owner, name):
        return True
    source = getattr(owner, "__module__", dotted).partition(".")[2].replace(".", "/")
    candidates = {folder, f"{folder}.py", source, f"{source}.py"} - {"", ".py"}
    return any(name in defined_in("torch", where) for where in candidates)


def missing(internal: Internal) -> bool:
    return not any(exists(internal, name) for name in internal.names)


@pytest.mark.parametrize("owner", sorted({(i.package, i.listed_in, i.owner) for i in INTERNALS}), ids="/".join)
def test_the_installed_version_has(owner: tuple[str, str, str]) -> None:
    package = owner[0]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if owner[2] == "optional":
        pytest.skip("looked for, and taken as off where it is not there")
    lacking = [" or ".join(i.names) for i in INTERNALS if (i.package, i.listed_in, i.owner) == owner and missing(i)]
    assert not lacking, f"{package} {metadata.version(package)} has no {', '.join(lacking)}"


@cache
def own_names(room: str) -> set[str]:
    """What the files of a room define themselves: functions, classes, variables, arguments, attributes of `self`."""
    found: set[str] = set()
    for node in (n for m in modules() if m.partition(".")[0] == room for n in ast.walk(modules()[m])):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "item"):
            found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return found


def touched_by(module: str) -> Iterator[str]:
    """Private names that a file uses and its room does not define; and what it asks engines for by name."""
    room = module.partition(".")[0]
    own = own_names(room) | NOT_INTERNALS
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in {*own, "_C", "_utils"}:
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            for alias in node.names:
                if any(map(private, [*node.module.split("."), alias.name])):
                    yield alias.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and room == "weights":
            if re.fullmatch(r"_[a-z]\w*", node.value) and node.value not in own:
                yield node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "need":
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


@pytest.mark.parametrize("module", modules())
def test_what_the_code_touches_is_listed(module: str) -> None:
    """In the Note of its own file or folder, or on the design page."""
    listed = {
        name
        for internal in INTERNALS
        if internal.listed_in == "design"
        or f"{module}.".startswith(f"{internal.listed_in}.")
        or internal.listed_in.partition(".")[0] == module.partition(".")[0] == "lightning"
        for name in internal.names
    }
    stray = set(touched_by(module)) - listed - NOT_INTERNALS - {"_autograd"}
    assert not stray, f"{module} touches {sorted(stray)}: list it in the file's Note, or in docs/design.md"


@pytest.mark.parametrize("internal", INTERNALS, ids=lambda i: f"{i.listed_in}-{i.owner}-{i.names[0]}".replace(" ", ""))
def test_what_is_listed_is_touched(internal: Internal) -> None:
    """A list that keeps what nobody uses any more is not read for long."""
    room = internal.listed_in.partition(".")[0]
    code = "\n".join(_code_of(module) for module in modules() if room in ("design", module.partition(".")[0]))
    assert any(re.search(rf"\b{name}\b", code) for name in internal.names)


@cache
def _code_of(module: str) -> str:
    """A file without the docstring at its top, which has the list."""
    tree = modules()[module]
    return "\n".join(ast.unparse(node) for node in (tree.body[1:] if ast.get_docstring(tree) else tree.body))


def main() -> None:
    """Print every name of every owner, and whether it exists."""
    for package in ("torch", "deepspeed", "lightning"):
        if find_spec(package) is None:
            print(f"{package}: not installed")
            continue
        of_it = [internal for internal in INTERNALS if internal.package == package]
        lacking = [i for i in of_it if missing(i)]
        print(f"{package} {metadata.version(package)}: {len(of_it) - len(lacking)} of {len(of_it)} names exist")
        for internal in lacking:
            optional = " (may lack it)" if internal.owner == "optional" else ""
            print(f"  missing: {internal.listed_in}, {internal.owner}: {' or '.join(internal.names)}{optional}")


if __name__ == "__main__":
    main()
