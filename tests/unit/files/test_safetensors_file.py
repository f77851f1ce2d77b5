"""Safetensors files that cannot be, and bits that flip in their headers."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from sharded_avg import CheckpointError
from sharded_avg.files.safetensors_file import SafetensorsFiles

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


def safetensors(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: Any = (3,), begin: Any = 0, end: Any = 12, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


BAD_SAFETENSORS = {
    "empty": b"",
    "only a length": struct.pack("<Q", 2**63),
    "a header beyond the file": struct.pack("<Q", 10**6) + b"{}",
    "no JSON": safetensors(b"{'a': 1}", b""),
    "a list": safetensors([], b""),
    "lists 100,000 deep": safetensors(b"[" * 100_000, b""),
    "NaN": safetensors(b'{"a": NaN}', b""),
    "a tensor that is none": safetensors({"a": 3}, b""),
    "an unknown dtype": safetensors({"a": entry(dtype="X9")}, bytes(12)),
    "a negative size": safetensors({"a": entry((-3,))}, bytes(12)),
    "a size that is a string": safetensors({"a": entry(("3",))}, bytes(12)),
    "an absurd shape": safetensors({"a": entry((2**40, 2**40))}, bytes(12)),
    "another number of bytes": safetensors({"a": entry((2,))}, bytes(12)),
    "beyond the file": safetensors({"a": entry((30,), 0, 120)}, bytes(12)),
    "negative offsets": safetensors({"a": entry((3,), -12, 0)}, bytes(12)),
    "overlapping tensors": safetensors({"a": entry(), "b": entry((3,), 4, 16)}, bytes(16)),
    "a hole": safetensors({"a": entry(), "b": entry((3,), 16, 28)}, bytes(28)),
    "bytes left over": safetensors({"a": entry()}, bytes(13)),
    "cut short": safetensors({"a": entry()}, bytes(11)),
    "metadata of numbers": safetensors({"__metadata__": {"x": 1}, "a": entry()}, bytes(12)),
}


@pytest.mark.parametrize("name", BAD_SAFETENSORS)
def test_safetensors_that_cannot_be(tmp_path, name):
    file = tmp_path / "x.safetensors"
    file.write_bytes(BAD_SAFETENSORS[name])
    with pytest.raises(CheckpointError):
        SafetensorsFiles(file)


def test_flipped_bits_in_the_header_of_safetensors(tmp_path):
    """The format has no checksum: a flip may change names or dtypes unnoticed, but never crash."""
    whole = safetensors({"a": entry(), "b": entry((2, 2), 12, 28)}, bytes(28))
    file = tmp_path / "x.safetensors"
    for position in range(len(whole) - 28):
        for bit in (0, 3, 6):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                source = SafetensorsFiles(file)
            except CheckpointError:
                continue
            assert sum(source.read(name).nbytes for name in source.infos) == 28
