"""Every private name of torch, DeepSpeed and Lightning that the package touches, and whether the installed one has it.

The lists are where the names are used: the Notes called internals at the top of the layouts and of
lightning/trainers.py, and the table in docs/design.md. The code is held to them here, and they to what is installed.
Names that stand whole in a string need no list: "torch._utils._rebuild_parameter" says itself where it is, and a class
that is known by its name only, as "BF16_Optimizer", has to be some class of its package.

The warnings that tests except, each for the versions that give it, are held to the installed sources here, too.

    python -m tests.unit.test_third_party      prints all of it: a new release of any of them, judged in a minute

A name exists if its owner has it, or if something in the owner's source defines or assigns it: what an instance gets in
`__init__` no class has. Nothing of DeepSpeed or Lightning is imported for that, only read.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sharded_avg.version import WORKS_WITH
from tests.helpers import excepted_warnings
from tests.helpers.excepted_warnings import EXCEPTED, Excepted
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
NOT_INTERNALS = {"_exit", "_getframe", "_Stop", "_Unpickler", "_replace", "_extra_state", "register_step_post_hook"}
# As rows of the table in docs/design.md.
PACKAGES = ("torch", "deepspeed", "lightning", "pytorch_lightning")
# Classes that only some of the supported releases have: the first and the last of them that has it.
CLASS_SPANS = {"SuperOffloadOptimizer_Stage3": ("0.18", None), "MiCS_Optimizer": ("0.16.9", "0.19.6")}


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


INTERNALS = [
    *notes(),
    *of_the_design_page(),
]


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
def own_attributes(room: str) -> set[str]:
    """What objects of a room have: what its classes define, and what methods set. No variable, no argument.

    A file may call a class by the name that torch has for it; torch's is no less private for that.
    """
    found: set[str] = set()
    for node in (n for m in modules() if m.partition(".")[0] == room for n in ast.walk(modules()[m])):
        if isinstance(node, ast.ClassDef):
            found |= {part.name for part in node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))}
            found |= {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}  # type: ignore[union-attr]
            found |= {target.id for part in node.body if isinstance(part, ast.Assign) for target in part.targets}  # type: ignore[attr-defined]
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "item"):
            found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return found


@cache
def imports(module: str) -> dict[str, str]:
    """What names stand for in a file, by its absolute imports: "nn" for "torch.nn"."""
    found: dict[str, str] = {}
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                found[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_third_partys(module: str, node: ast.Attribute) -> bool:
    """Whether the expression starts at something that was imported from one of PACKAGES."""
    start = ast.unparse(node).partition(".")[0]
    return imports(module).get(start, "").partition(".")[0] in PACKAGES


def touched_by(module: str) -> Iterator[str]:
    """Private names that a file uses and its room's objects do not have; and what it asks engines for by name."""
    room = module.partition(".")[0]
    own = own_attributes(room) | NOT_INTERNALS
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in {"_C", "_utils"}:
            if is_third_partys(module, node) or node.attr not in own:
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            for alias in node.names:
                if any(map(private, [*node.module.split("."), alias.name])):
                    yield alias.name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and room not in ("files", "formats"):
            if re.fullmatch(r"_[A-Za-z]\w*", node.value) and node.value not in own:  # in those two: keys of files
                yield node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "need":
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


class Named(NamedTuple):
    """A string of the package that names something of another."""

    module: str  # where the string is
    package: str
    name: str  # dotted, or a class


def strings_in(module: str) -> Iterator[tuple[str, str]]:
    """Every string of a file but docstrings and `__all__`, and the function or operator that it is given to, or ""."""
    tree = modules()[module]
    given: dict[int, str] = {}
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.add(id(node.value))
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            left_out |= set(map(id, ast.walk(node.value)))
        elif isinstance(node, ast.Compare) and "__name__" in ast.unparse(node):
            given |= {id(part): "==" for part in ast.walk(node)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("is_a", "is_named"):
            given |= {id(part): "is_a" for part in node.args}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in left_out:
            yield node.value, given.get(id(node), "")
    if any(isinstance(part, ast.JoinedStr) for node in tree.body for part in ast.walk(node) if _is_assignment(node)):
        for value in vars(importlib.import_module(f"sharded_avg.{module}")).values():  # as they were put together
            if isinstance(value, (set, frozenset, tuple, list)):
                yield from ((text, "") for text in value if isinstance(text, str))


def _is_assignment(node: ast.stmt) -> bool:
    return isinstance(node, (ast.Assign, ast.AnnAssign))


def named_in(module: str) -> Iterator[Named]:
    """Modules and their members by dotted name; classes, where engines are known by the names of their classes."""
    room = module.partition(".")[0]
    for text, given_to in strings_in(module):
        dotted = text.removesuffix(".")
        package = dotted.partition(".")[0]
        if package in PACKAGES and re.fullmatch(r"\w+(\.\w+)+", dotted):
            yield Named(module, package, dotted)
        elif (given_to and re.fullmatch(r"_?[A-Z]\w*", text)) or (
            room in ("weights", "lightning") and re.fullmatch(r"_?[A-Z]\w*[a-z]\w*[A-Z_]\w*|[A-Z]{2}\w*[a-z]\w*", text)
        ):
            yield Named(module, "deepspeed" if module.startswith("weights.layouts.zero") else "lightning", text)


NAMED = sorted({named for module in modules() for named in named_in(module)})


@cache
def classes_of(package: str) -> frozenset[str]:
    """Every class that some file of the package defines, read, not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return frozenset()
    files = Path(spec.origin).parent.rglob("*.py")
    return frozenset(name for file in files for name in re.findall(r"^\s*class (\w+)", file.read_text(), re.MULTILINE))


def is_there(named: Named) -> bool:
    """Whether the installed package has what the string names; True for a class that this release need not have."""
    if "." not in named.name:
        span = CLASS_SPANS.get(named.name)
        if span is not None and not excepted_warnings.is_within(metadata.version(named.package), *span):
            return named.name not in classes_of(named.package)
        return named.name in classes_of(named.package)
    if named.package == "torch":
        try:
            resolved(named.name)
        except AttributeError:
            return False
        return True
    spec = find_spec(named.package)
    assert spec is not None
    assert spec.origin is not None
    place = Path(spec.origin).parent.joinpath(*named.name.split(".")[1:])
    if place.is_dir() or place.with_suffix(".py").exists():
        return True
    return place.name in defined_in(named.package, f"{place.parent.relative_to(Path(spec.origin).parent)}.py")


@pytest.mark.parametrize("named", NAMED, ids=lambda named: f"{named.module}-{named.name}")
def test_what_a_string_names_is_there(named: Named) -> None:
    """A class with a span in CLASS_SPANS has to be there within it, and not outside: the span is a fact."""
    if find_spec(named.package) is None:
        pytest.skip(f"{named.package} is not installed")
    assert is_there(named), f"{named.package} {metadata.version(named.package.replace('_', '-'))}: {named.name}"


@pytest.mark.parametrize("name", CLASS_SPANS)
def test_a_span_is_of_a_class_that_is_named(name: str) -> None:
    assert name in {named.name for named in NAMED}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("weights.names", "_FabricModule"),
        ("weights.layouts.zero.engine", "SuperOffloadOptimizer_Stage3"),
        ("weights.layouts.zero.engine", "BF16_Optimizer"),  # a key of a table
        ("weights.layouts.zero.engine", "deepspeed.runtime.engine"),
        ("files.stored", "torch._utils._rebuild_parameter_with_state"),
        ("files.stored", "torch._tensor._rebuild_from_type_v2"),
        ("files.stored", "torch.serialization._get_layout"),
        ("files.dcp_folder", "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING"),  # put together
        ("lightning.stepping", "DeepSpeedStrategy"),
        ("weights.buffers", "torch.ao"),
    ],
)
def test_the_scan_finds_each_kind_of_string(module: str, name: str) -> None:
    assert name in {named.name for named in NAMED if named.module == module}


def test_a_variable_of_the_same_name_hides_nothing() -> None:
    assert "_BatchNorm" in set(touched_by("evaluation.batch_norm"))


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


@pytest.mark.parametrize("excepted", EXCEPTED, ids=lambda excepted: excepted.filter.split(":")[1][:50])
class TestExcepted:
    def test_it_is_for_a_supported_version_and_has_a_reason(self, excepted: Excepted) -> None:
        oldest, newest = WORKS_WITH[excepted.package]
        assert excepted_warnings.release(excepted.first) <= excepted_warnings.release(newest), "for no release yet"
        assert excepted.last is None or excepted_warnings.is_within(oldest, "0", excepted.last), "stale: delete it"
        assert len(excepted.reason.split()) > 2

    def test_what_is_installed_says_it_within_the_span_only(self, excepted: Excepted) -> None:
        """So that an entry is found when its package no longer warns, and when its span is too short or too long."""
        version = excepted_warnings.installed(excepted.package)
        if version is None:
            pytest.skip(f"{excepted.package} is not installed")
        spec = find_spec(excepted.said_in.partition("/")[0])
        if spec is None or spec.origin is None:
            pytest.skip(f"{excepted.said_in.partition('/')[0]} is not installed")
        file = Path(spec.origin).parents[1] / excepted.said_in
        within = excepted_warnings.is_within(version, excepted.first, excepted.last)
        says = file.exists() and _says(file, excepted)
        assert says == within, f"{excepted.package} {version}: {excepted.said_in} {'has' if says else 'lacks'} it"


def _says(file: Path, excepted: Excepted) -> bool:
    """Whether the message that is excepted stands in the file, or the call that brings it about."""
    if excepted.sign:
        return excepted.sign.encode() in file.read_bytes()
    message = re.compile(excepted.filter.split(":")[1])
    return any(message.match(text) for text in _texts_of(file))


@cache
def _texts_of(file: Path) -> tuple[str, ...]:
    """Every string of a file, as it is when its parts are joined; "x" for what is put into it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return tuple(found)


def test_the_ranks_go_by_the_list_too(pytestconfig: pytest.Config) -> None:
    """The ranks of pools, and what strategies spawn, ask pytest for its settings without any conftest."""
    program = (
        "from tests.helpers.excepted_warnings import settings_of_a_child\n"
        "print(*settings_of_a_child().getini('filterwarnings'), sep='\\n')"
    )
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout
    assert said.splitlines() == pytestconfig.getini("filterwarnings")
    assert set(excepted_warnings.filters()) <= set(said.splitlines())


def test_the_flat_list_has_no_third_party() -> None:
    """In pyproject.toml it would be for every version, and nobody would find out when it is not needed any more."""
    flat = re.search(r"^filterwarnings = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert flat is not None
    assert re.findall(r"""^  (?:"|')(.*?)(?:"|'),""", flat[1], re.MULTILINE) == [
        "error",
        "ignore:other ranks did not leave the swap within:UserWarning",
    ]


def main() -> None:
    """Print every name of every owner, and whether it exists."""
    for package in PACKAGES:
        if find_spec(package) is None:
            print(f"{package}: not installed")
            continue
        version = metadata.version(package.replace("_", "-"))
        of_it = [internal for internal in INTERNALS if internal.package == package]
        lacking = [i for i in of_it if missing(i)]
        named = [named for named in NAMED if named.package == package]
        gone = [each for each in named if not is_there(each)]
        print(
            f"{package} {version}: {len(of_it) - len(lacking)} of {len(of_it)} listed names exist, and "
            f"{len(named) - len(gone)} of {len(named)} that stand in strings"
        )
        for internal in lacking:
            optional = " (may lack it)" if internal.owner == "optional" else ""
            print(f"  missing: {internal.listed_in}, {internal.owner}: {' or '.join(internal.names)}{optional}")
        for each in gone:
            print(f"  missing: {each.module}: {each.name}")


if __name__ == "__main__":
    main()
