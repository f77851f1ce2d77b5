"""What docs/api.md names has a docstring of its own, down to each public method: the site leaves out what has none.

An inherited one is not enough: mkdocstrings does not show it. Files are read and nothing of the package is imported, so
that it runs where the site is built, without torch:

    python -m tests.unit.test_docstrings     ends with an error that names what lacks one
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def shown() -> dict[str, ast.AST]:
    """Every name that the page takes from the package, with its members, as mkdocs.yml filters them (`!^_`)."""
    names = re.findall(r"^::: (sharded_avg\.\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    return {member: node for name in names for member, node in _and_members(name, _node(name))}


def _node(name: str) -> ast.AST:
    path = ROOT.joinpath(*name.split("."))
    if path.with_suffix(".py").exists():
        return ast.parse(path.with_suffix(".py").read_text())
    body = ast.parse(path.parent.with_suffix(".py").read_text()).body
    return next(node for node in body if isinstance(node, DEFINITIONS) and node.name == path.name)


def _and_members(name: str, node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    yield name, node
    for child in node.body if isinstance(node, (ast.Module, ast.ClassDef)) else ():
        if isinstance(child, DEFINITIONS) and not child.name.startswith("_"):
            yield from _and_members(f"{name}.{child.name}", child)


def lacking() -> list[str]:
    """What the site would leave out."""
    return [name for name, node in shown().items() if ast.get_docstring(node) is None]  # type: ignore[arg-type]


def test_what_the_api_page_names_has_a_docstring() -> None:
    assert not lacking(), "the API page would leave these out: a docstring of one true sentence each"


def test_members_are_looked_at() -> None:
    some = {"averager.ShardedAverage.update", "averager.ShardedAverage.names", "rules.ema.EMA.weight"}
    some |= {"rules.decays.Debiased.over", "formats.open.load_averaged_state_dict", "errors.PeerError"}
    assert {f"sharded_avg.{name}" for name in some} <= set(shown())


if __name__ == "__main__":
    if names := lacking():
        sys.exit("without a docstring, so that the API page would leave them out:\n  " + "\n  ".join(names))
