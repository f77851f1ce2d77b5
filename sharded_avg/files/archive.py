"""The zip archive that torch.save writes, as a list of byte ranges.

    Record   where one member's bytes lie in the file, and their checksum
    records  the directory of an archive that fills a known part of a file, such as one item of a .distcp file

torch stores members uncompressed, so a tensor can be read in pieces straight from the file. The standard library's
zipfile is lenient on purpose (junk before and after, whatever looks like an end); a damaged or hostile checkpoint must
be refused, so the directory is read here, strictly.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from ..errors import CheckpointError

_END = struct.Struct("<4sHHHHIIH")
_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_MAX_DIRECTORY_BYTES = 256 << 20  # a million members
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One member: `nbytes` bytes at `offset` of the file. `crc` is 0 where none was computed."""

    offset: int
    nbytes: int
    crc: int


def records(file: BinaryIO, start: int, length: int) -> dict[str, Record]:
    """The members of the archive that fills `length` bytes at `start`, without their first folder.

    Raises `CheckpointError` for anything but what torch.save writes.
    """
    found: dict[str, Record] = {}
    position = 0
    try:
        directory, count = _directory(file, start, length)
        for _ in range(count):
            fields = _ENTRY.unpack_from(directory, position)
            signature, _, _, flags, method, _, _, crc, packed, size, num_name, num_extra, num_comment, *_, at = fields
            fits = signature == b"PK\x01\x02" and method == 0 and not flags & 1
            _require(fits, "a member that torch would not write")
            position += _ENTRY.size
            name = directory[position : position + num_name].decode()
            extra = directory[position + num_name : position + num_name + num_extra]
            position += num_name + num_extra + num_comment
            size, packed, at = _wide(extra, size, packed, at)
            _require(size == packed, "a member of two sizes")
            offset = _data_offset(file, start + at, name, start + length)
            _require(offset + size <= start + length, f"the member {name!r} beyond its end")
            short = name.partition("/")[2]
            _require(short not in found, f"the member {name!r} twice")
            found[short] = Record(offset, size, crc)
    except (struct.error, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"not a whole archive of torch.save ({error})") from error
    _require(position == len(directory), "a directory of another length")
    return found


def is_archive(file: BinaryIO) -> bool:
    """Whether the file begins as an archive does."""
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"


def read_record(file: BinaryIO, record: Record, *, max_bytes: int) -> bytes:
    """A small member, checked against its checksum. Raises `CheckpointError` if it is damaged or not small."""
    _require(record.nbytes <= max_bytes, f"{record.nbytes} bytes where at most {max_bytes} were expected")
    data = _read(file, record.offset, record.nbytes)
    _require(record.crc in (0, zlib.crc32(data)), "a checksum that does not match")
    return data


def verify(file: BinaryIO, record: Record) -> None:
    """Raise `CheckpointError` if a member's bytes do not have its checksum. Reads 8 MiB at a time."""
    if not record.crc:  # torch.serialization.set_crc32_options(False)
        return
    crc, left = 0, record.nbytes
    file.seek(record.offset)
    buffer = memoryview(bytearray(min(_PIECE_BYTES, left)))
    while left:
        count = file.readinto(buffer[: min(_PIECE_BYTES, left)])  # type: ignore[attr-defined]
        _require(bool(count), "an early end")
        crc = zlib.crc32(buffer[:count], crc)
        left -= count
    _require(crc == record.crc, "a checksum that does not match: bytes of it have changed since it was written")


def _directory(file: BinaryIO, start: int, length: int) -> tuple[bytes, int]:
    """The bytes of the directory, which must be followed by the end of the archive and nothing else."""
    _require(length >= _END.size and _read(file, start, 4) == b"PK\x03\x04", "another beginning")
    end_at = start + length - _END.size
    signature, _, _, _, count, size, at, num_comment = _END.unpack(_read(file, end_at, _END.size))
    _require(signature == b"PK\x05\x06" and num_comment == 0, "another end")
    end = end_at
    if end_at - start >= _LOCATOR.size:
        locator, _, at64, _ = _LOCATOR.unpack(_read(file, end_at - _LOCATOR.size, _LOCATOR.size))
        if locator == b"PK\x06\x07":
            _require(at64 + _END64.size + _LOCATOR.size <= length - _END.size, "its end beyond its end")
            signature, *_, count, size, at = _END64.unpack(_read(file, start + at64, _END64.size))
            _require(signature == b"PK\x06\x06", "another end")
            end = start + at64
    _require(start + at + size == end, "a directory in another place")
    _require(size <= _MAX_DIRECTORY_BYTES and count * _ENTRY.size <= size, "a directory of another length")
    return _read(file, start + at, size), count


def _wide(extra: bytes, size: int, packed: int, at: int) -> tuple[int, int, int]:
    """Replace fields that did not fit 32 bits by those of the zip64 extra field."""
    values = [size, packed, at]
    position = 0
    while position + 4 <= len(extra):
        kind, num_bytes = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{num_bytes // 8}Q", extra, position + 4))
            values = [next(wide) if value == 0xFFFFFFFF else value for value in values]
            break
        position += 4 + num_bytes
    return values[0], values[1], values[2]


def _data_offset(file: BinaryIO, at: int, name: str, stop: int) -> int:
    _require(0 <= at <= stop - _LOCAL.size, f"the member {name!r} beyond its end")
    signature, *_, num_name, num_extra = _LOCAL.unpack(_read(file, at, _LOCAL.size))
    _require(signature == b"PK\x03\x04", f"the member {name!r} in another place")
    _require(_read(file, at + _LOCAL.size, num_name) == name.encode(), f"another name for {name!r}")
    return at + _LOCAL.size + int(num_name) + int(num_extra)


def _read(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    data = file.read(count)
    _require(len(data) == count, "an early end")
    return data


def _require(fits: bool, found: str) -> None:
    if not fits:
        raise CheckpointError(f"not a whole archive of torch.save: it has {found}")
