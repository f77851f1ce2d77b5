"""Plain values as JSON, for what modules keep as extra state: nothing of a file runs when it is read back.

    None, bool, int, str, finite float     themselves
    list                                   a list
    everything else                        an object with one entry, whose name says what it is:
                                           {"tensor": [dtype, shape, base64]}, {"dict": [[key, value], ...]}, ...

Objects of other classes would need their class to be looked up and run: they are refused.
"""

from __future__ import annotations

import base64
import io
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..files.stored import bytes_of

_MAX_DEPTH = 100
_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


def encode(value: Any, depth: int = 0) -> Any:
    """The JSON value for a plain value. Raises `TypeError`, which names the class, for anything else."""
    if depth > _MAX_DEPTH:
        raise TypeError(f"values nested more than {_MAX_DEPTH} deep")
    kind = type(value)
    if value is None or kind in (bool, int, str) or (kind is float and math.isfinite(value)):
        return value
    if kind is list:
        return [encode(entry, depth + 1) for entry in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [encode(entry, depth + 1) for entry in value]}
    if kind in (dict, OrderedDict):
        return {kind.__name__: [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in value.items()]}
    if kind in (float, complex):
        return {kind.__name__: repr(value)}
    if kind in (bytes, bytearray):
        return {kind.__name__: _text(value)}
    if kind is io.BytesIO:
        return {"BytesIO": _text(value.getvalue())}
    if kind is torch.Size:
        return {"Size": list(value)}
    if kind in (torch.dtype, torch.device):
        return {kind.__name__: str(value).removeprefix("torch.")}
    if kind in (Tensor, torch.nn.Parameter) and value.layout == torch.strided and value.device.type != "meta":
        whole = value.detach().cpu().contiguous()
        return {"tensor": [str(whole.dtype).removeprefix("torch."), list(whole.shape), _text(bytes_of(whole))]}
    raise TypeError(f"a {kind.__module__}.{kind.__qualname__}")


def decode(value: Any, depth: int = 0) -> Any:
    """The plain value that `encode` gave this JSON value for. Raises `ValueError` for any other."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"values nested more than {_MAX_DEPTH} deep")
    if isinstance(value, list):
        return [decode(entry, depth + 1) for entry in value]
    if not isinstance(value, dict):
        return value
    try:
        [(kind, content)] = value.items()
        if kind in ("dict", "OrderedDict"):
            return _MAKE[kind]([(decode(k, depth + 1), decode(v, depth + 1)) for k, v in content])
        if kind in ("tuple", "set", "frozenset"):
            return _MAKE[kind]([decode(entry, depth + 1) for entry in content])
        return _MAKE[kind](content)
    except (TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"not a plain value: {error!r}") from error


def _text(data: Any) -> str:
    return base64.b64encode(data).decode("ascii")


def _data(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _tensor(content: Any) -> Tensor:
    dtype, shape, text = content
    data = bytearray(_data(text))
    full = torch.empty(shape, dtype=_DTYPES[dtype]) if math.prod(shape) * _DTYPES[dtype].itemsize == len(data) else None
    if full is None:
        raise ValueError(f"a tensor of shape {shape} and {dtype} in {len(data)} bytes")
    if data:
        bytes_of(full)[:] = data
    return full


_MAKE: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "float": float,
    "complex": complex,
    "bytes": _data,
    "bytearray": lambda text: bytearray(_data(text)),
    "BytesIO": lambda text: io.BytesIO(_data(text)),
    "Size": torch.Size,
    "dtype": lambda name: _DTYPES[name],
    "device": torch.device,
    "tensor": _tensor,
}
