"""What options of several commands mean, once for all of them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import torch

DTYPES = {
    "keep": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
_NEGATIVE = re.compile(r"-\s*(\.?\d|inf\b|nan\b)", re.IGNORECASE)
_OPTION = re.compile(r"--[^-=][^=]*")  # without a value yet
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """--dtype; `DTYPES[args.dtype]` is what it says."""
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="keep", help="of floating-point tensors")


def add_name(parser: argparse.ArgumentParser) -> None:
    """--name, of one average among several or of a part of a plain checkpoint."""
    parser.add_argument("--name", help="which average; in a plain checkpoint, the key that the weights are under")


def add_allow_nonfinite(parser: argparse.ArgumentParser) -> None:
    """--allow-nonfinite, of what is rounded or summed."""
    parser.add_argument("--allow-nonfinite", action="store_true", help="write infinities and NaN, too")


def joined_numbers(argv: Sequence[str]) -> list[str]:
    """`--option -2,3` as `--option=-2,3`: what begins with a dash is an option to argparse, unless it is one number."""
    joined: list[str] = []
    for word in argv:
        if _NEGATIVE.match(word) and joined and _OPTION.fullmatch(joined[-1]):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def numbers(text: str) -> list[float]:
    """The type of an option that takes several numbers, with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers: write 1,1,2 or -2,3") from None


def num_bytes(text: str) -> int:
    """The type of an option that takes a size: 5GB, 500 MB, 2GiB, 7."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB, 500MB or 2GiB")
    base = 1024 if match[3] else 1000
    return max(1, int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " ")))
