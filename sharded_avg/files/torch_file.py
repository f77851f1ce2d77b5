"""A file of torch.save, as a source: read a piece at a time, whatever its size, and nothing of it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..shard import Box
from .archive import is_archive, read_record, records
from .facts import MAX_JSON_BYTES, METADATA_KEY, load_facts
from .source import AbstractSource, Lazy, TensorInfo, is_extra
from .stored import Stored, StoredFile, torch_content


class TorchFile(AbstractSource):
    """A file of torch.save, in the zip format that torch has written since 1.6.

    `content` is the saved object: dicts, lists and plain values, with a Stored in place of each tensor, none of them
    read yet. As a source it has every tensor of a flat or nested dict, under its keys joined by dots; `extra` are the
    modules' extra states that are no tensors.
    Raises `CheckpointError` for what is damaged, or needs classes beyond tensors and plain values; with `foreign`, a
    word stands in the place of each object of such a class.
    """

    def __init__(self, path: str | os.PathLike[str], *, foreign: bool = False) -> None:
        self._file = StoredFile(path)
        what = repr(str(path))
        facts: dict[str, Any] = {}
        try:
            with self._file.open() as file:
                if not is_archive(file):
                    raise CheckpointError(
                        f"{what} is not a file that torch.save writes today. If torch.load opens it, save it again"
                    )
                members = records(file, 0, self._file.nbytes)
                self.content: Any = torch_content(file, members, what=what, foreign=foreign)
                if METADATA_KEY in members:  # what `write_torch` put beside the tensors, where torch.load does not look
                    text = read_record(file, members[METADATA_KEY], max_bytes=MAX_JSON_BYTES)
                    facts = load_facts(text.decode(errors="replace"))
        except OSError as error:
            raise CheckpointError(f"{what} cannot be read: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(f"{error}" if what in str(error) else f"{what} is damaged: {error}") from error
        self._tensors = dict(flat_tensors(self.content))
        self.infos = {name: TensorInfo(stored.shape, stored.dtype) for name, stored in self._tensors.items()}
        self.facts = {**facts, "format": "torch"}
        states = dict(_extra_states(self.content))
        self.extra = Lazy({name: name for name in states}, lambda name: self._with_tensors(states[name]))

    def _with_tensors(self, value: Any) -> Any:
        """A value with a tensor in place of each Stored."""
        if isinstance(value, Stored):
            return self._file.read(value)
        if isinstance(value, dict):
            return {key: self._with_tensors(entry) for key, entry in value.items()}
        return type(value)(map(self._with_tensors, value)) if isinstance(value, (list, tuple)) else value

    def read(self, name: str, box: Box | None = None) -> Tensor:
        return self._file.read(self._tensors[name], box)

    def ties(self) -> dict[str, str]:
        """Further names of one and the same tensor -> its first name."""
        first: dict[Stored, str] = {}
        named = {
            name: first.setdefault(stored, name) for name, stored in self._tensors.items() if 0 not in stored.shape
        }
        return {name: original for name, original in named.items() if name != original}


def flat_tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, Stored]]:
    """Every Stored of nested dicts, lists and tuples, under its keys joined by dots; not those inside extra states."""
    if isinstance(content, Stored):
        yield prefix, content
    elif isinstance(content, (dict, list, tuple)) and not is_extra(prefix):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from flat_tensors(value, f"{prefix}.{key}" if prefix else str(key))


def _extra_states(content: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every extra state that is no tensor."""
    if is_extra(prefix):
        yield from () if isinstance(content, Stored) else ((prefix, content),)
    elif isinstance(content, (dict, list, tuple)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _extra_states(value, f"{prefix}.{key}" if prefix else str(key))
