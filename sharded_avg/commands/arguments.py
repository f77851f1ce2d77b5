"""What options of several commands mean, once for all of them."""

from __future__ import annotations

import argparse
import re

import torch

DTYPES = {
    "keep": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """--dtype; `DTYPES[args.dtype]` is what it says."""
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="keep", help="of floating-point tensors")


def add_name(parser: argparse.ArgumentParser) -> None:
    """--name, of one average among several or of a part of a plain checkpoint."""
    parser.add_argument("--name", help="which average; in a plain checkpoint, the key that the weights are under")


def numbers(text: str) -> list[float]:
    """The type of an option that takes several numbers, with commas between them."""
    return [float(part) for part in text.split(",")]


def num_bytes(text: str) -> int:
    """The type of an option that takes a size: 5GB, 500 MB, 2GiB, 7."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB, 500MB or 2GiB")
    base = 1024 if match[3] else 1000
    return max(1, int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " ")))
