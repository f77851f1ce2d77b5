"""`sharded-avg convert`: an average of another tool into ours, or ours into another's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..formats.importers import IMPORTERS
from .arguments import DTYPES, add_allow_nonfinite, add_dtype
from .conversion import TARGETS, Conversion, read_names
from .progress import progress, say
from .target import TORCH_SUFFIXES


def add_to(commands: Any) -> None:
    """Add the subcommand to the parser's subparsers."""
    parser = commands.add_parser(
        "convert",
        help="turn an average of another tool into ours, or ours into another's",
        description="OUT is a folder that ShardedAverage.load reads, unless --to or its ending (.safetensors) says "
        "otherwise. docs/formats.md lists what is recognised.",
    )
    parser.add_argument("src", metavar="SRC", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    formats = ("sharded_avg", *(importer.format for importer in IMPORTERS))
    parser.add_argument("--from", dest="format", choices=formats, metavar="FORMAT", help=f"one of {', '.join(formats)}")
    parser.add_argument("--to", choices=TARGETS, help="by the ending of OUT, if left out")
    parser.add_argument("--name", help="which average, where ours has several")
    parser.add_argument("--names", type=Path, metavar="FILE", help="the averaged parameters' names, in order")
    parser.add_argument("--prefix", default="", help="keep names that begin with it, and take it off ('model.')")
    parser.add_argument("--add-prefix", default="", help="put it before every name")
    parser.add_argument("--raw", type=Path, metavar="SRC", help="raw weights, for --to lightning and averaged_model")
    parser.add_argument("--n-averaged", type=int, metavar="N", help="updates so far, where the format has no count")
    parser.add_argument("--ignore-classes", action="store_true", help="open files with foreign objects, without them")
    add_dtype(parser)
    add_allow_nonfinite(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    """Convert as the command line says, and tell what was done in one line of JSON on the standard output."""
    if args.to is None and args.out.suffix in TORCH_SUFFIXES:
        raise ConfigError(
            f"{str(args.out)!r} can be written in several formats: say --to averaged_model, lightning or torch"
        )
    conversion = Conversion(
        src=args.src,
        out=args.out,
        to=args.to or ("safetensors" if args.out.suffix == ".safetensors" else "sharded_avg"),
        format=args.format,
        name=args.name,
        names=None if args.names is None else read_names(args.names),
        prefix=args.prefix,
        add_prefix=args.add_prefix,
        raw=args.raw,
        n_averaged=args.n_averaged,
        dtype=DTYPES[args.dtype],
        ignore_classes=args.ignore_classes,
        allow_nonfinite=args.allow_nonfinite,
    )
    with progress() as report:
        source = conversion.run(report)
    facts = source.facts
    if "not recorded" in str(facts.get("provenance", {}).get("n_averaged")):
        say(
            "this format does not record how many updates went in: 1 was written. A rule that counts (SWA, warm-up) "
            "goes on from there; give --n-averaged to say how many"
        )
    dtypes = sorted({str(info.dtype).removeprefix("torch.") for info in source.infos.values()})
    told = {"to": conversion.to, "tensors": len(source.infos), "dtypes": dtypes, "n_averaged": facts.get("n_averaged")}
    print(json.dumps({"from": facts.get("format"), **told, "step": facts.get("step")}))
