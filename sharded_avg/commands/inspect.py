"""`sharded-avg inspect`: what is in a file or folder of weights, for people and for programs.

describe  a path -> JSON values
table     those -> text
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files.source import AbstractSource, TensorInfo
from ..formats.open import StrPath, open_source
from ..saved.manifest import FORMAT
from ..saved.sources import SavedAverages, saved_averages
from .sums.profile_plot import draw_shares, require_matplotlib
from .sums.shares import told_by

_STRETCHES, _DRAWN = 10, 100  # of a profile: told, and in a picture
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def describe(path: StrPath, *, tensors: bool = False, stretches: int = 0) -> dict[str, Any]:
    """What a path holds: "path", "format", "averages", "num_tensors", "num_parameters", "num_bytes", "dtypes", ...

    "averages" maps names to "n_averaged", "rule" and "updates", as far as they are known, and is empty for plain
    weights. For rules of this package there are "decay" (the share that stayed at the latest update) and "horizon"
    (the effective number of updates in the average), too, and "profile", the share of each of so many equal `stretches`
    of the steps. Numbers are of one average. With `tensors`, names, shapes and dtypes come too. Nothing but the index
    is read. Raises `CheckpointError` for what cannot be read.
    """
    saved = saved_averages(Path(path))
    if saved is not None:
        return _of_saved(path, saved, tensors, stretches)
    return _of_source(path, open_source(path), tensors, stretches)


def _of_saved(path: StrPath, saved: SavedAverages, tensors: bool, stretches: int) -> dict[str, Any]:
    manifest = asdict(saved.manifest)
    for record in manifest["averages"].values():
        record |= told_by(record, stretches)
    infos: dict[str, TensorInfo] = {}
    extra: list[str] = []
    for name, record in saved.manifest.averages.items():
        if record.n_averaged:
            source = saved.source(name)
            infos = {key: info for key, info in source.infos.items() if key not in saved.manifest.aliases}
            extra = list(source.extra)
    return {
        "path": os.fspath(path),
        "format": FORMAT,
        "step": manifest["step"],
        "averages": manifest["averages"],
        "aliases": manifest["aliases"],
        "schedule": manifest["schedule"],
        "provenance": manifest["provenance"],
        "package": manifest["package"],
        "torch": manifest["torch"],
        "extra": extra,
        **_sizes(infos, tensors),
    }


def _of_source(path: StrPath, source: AbstractSource, tensors: bool, stretches: int) -> dict[str, Any]:
    facts = source.facts
    average = facts.get("average")
    own = {key: facts[key] for key in ("n_averaged", "rule", "updates") if key in facts}
    records = facts.get("averages", {} if average is None else {average: own})
    aliases = facts.get("aliases", {})
    return {
        "path": os.fspath(path),
        "format": facts.get("format"),
        "step": facts.get("step"),
        "averages": {name: record | told_by(record, stretches) for name, record in records.items()},
        "aliases": aliases,
        "provenance": facts.get("provenance", {}),
        "extra": list(source.extra),
        **_sizes({name: info for name, info in source.infos.items() if name not in aliases}, tensors),
    }


def _sizes(infos: Mapping[str, TensorInfo], tensors: bool) -> dict[str, Any]:
    dtypes = {name: str(info.dtype).removeprefix("torch.") for name, info in infos.items()}
    sizes: dict[str, Any] = {
        "num_tensors": len(infos),
        "num_parameters": sum(info.nbytes // info.dtype.itemsize for info in infos.values()),
        "num_bytes": sum(info.nbytes for info in infos.values()),
        "dtypes": sorted(set(dtypes.values())),
    }
    if tensors:
        sizes["tensors"] = {name: {"shape": list(i.shape), "dtype": dtypes[name]} for name, i in infos.items()}
    return sizes


def table(found: Mapping[str, Any]) -> str:
    """`describe`'s answer as lines of text."""
    lines = [found["path"], f"  format     {found['format']}"]
    if found.get("package"):
        lines[-1] += f" (written by sharded_avg {found['package']} with torch {found['torch']})"
    if found.get("step") is not None:
        lines.append(f"  step       {found['step']}")
    size = f"{found['num_parameters']:,} numbers, {human_bytes(found['num_bytes'])}, {', '.join(found['dtypes'])}"
    lines.append(f"  tensors    {found['num_tensors']} ({size})" if found["num_tensors"] else "  tensors    none yet")
    if found["aliases"]:
        lines.append(f"  tied       {len(found['aliases'])} more names")
    if found["extra"]:
        lines.append(f"  extra      {len(found['extra'])} states of modules that are no tensors")
    if found["averages"]:
        rows = [["average", "updates", "rule", "decay", "horizon"]]
        for name, record in found["averages"].items():
            numbers = [f"{record[key]:.6g}" if key in record else "" for key in ("decay", "horizon")]
            rows.append([name, str(record.get("n_averaged", "?")), _inline(record.get("rule") or "?"), *numbers])
        if not any(row[3] for row in rows[1:]):
            rows = [row[:3] for row in rows]
        lines += ["", *columns(rows)]
    else:
        lines.append("  averages   none: these are plain weights")
    for name, record in found["averages"].items():
        if "profile" in record:
            rows = [[f"{first}..{last}", f"{100 * share:.3g} %"] for first, last, share in record["profile"]]
            lines += ["", *columns([["steps", f"share of {name}"], *rows])]
    if found.get("provenance"):
        lines.append(f"  made by    {_inline(found['provenance'])}")
    if "tensors" in found:
        lines.append("")
        lines += columns([[name, str(t["shape"]), t["dtype"]] for name, t in found["tensors"].items()])
    # Names come from a file that anyone may have made: no control characters reach the terminal.
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)


def columns(rows: list[list[str]]) -> list[str]:
    """Rows of a table as lines."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        kind = value.get("kind")
        rest = ", ".join(f"{key}={_inline(entry)}" for key, entry in value.items() if key != "kind")
        return f"{kind}({rest})" if kind is not None else f"({rest})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_inline, value))}]"
    return str(value)


def human_bytes(count: float) -> str:
    """A number of bytes with three digits and a decimal unit, as disks and `--max-shard-size` count."""
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            break
        count /= 1000
    return f"{count:.3g} {unit}"


def add_to(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers."""
    parser = commands.add_parser("inspect", help="say what a file or folder of weights holds")
    parser.add_argument("src", metavar="SRC", help="a saved average, a checkpoint that has one, or plain weights")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--tensors", action="store_true", help="names, shapes and dtypes too")
    parser.add_argument("--profile", action="store_true", help="which share of an average each stretch of steps has")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw that")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.plot is not None:
        require_matplotlib()
        drawn = describe(args.src, stretches=_DRAWN)["averages"]
        profiles = {name: record["profile"] for name, record in drawn.items() if "profile" in record}
        if not profiles:
            raise ConfigError(
                f"--plot {str(args.plot)!r}: of no average in {args.src!r} is it known what it is made of: there is "
                "none, none has begun, or their rules are functions or another tool's"
            )
        draw_shares(profiles, args.plot)
    found = describe(args.src, tensors=args.tensors, stretches=_STRETCHES if args.profile else 0)
    print(json.dumps(found, indent=1) if args.json else table(found))
