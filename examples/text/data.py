"""English text that every Python carries, as bytes.

    topic       one help text of the interpreter: what `help("if")` shows
    vocabulary  the 256 byte values, so that there is no tokenizer to explain
    window      context + 1 successive bytes: inputs are all but the last, targets all but the first

Topics quote each other at length (the long ones contain the short ones), so a paragraph counts only where it appears
first; otherwise the held-out text would be full of sentences that the model was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from torch import Tensor

VOCABULARY_SIZE = 256
HELD_OUT = 0.1  # of the bytes, at least: the last topics of the alphabet


def unique_topics() -> list[bytes]:
    """The topics in alphabetical order, each without the paragraphs that an earlier one has."""
    seen: set[str] = set()
    texts = []
    for name in sorted(topics):
        paragraphs = [" ".join(block.split()) for block in topics[name].split("\n\n")]
        fresh = [block for block in dict.fromkeys(paragraphs) if block and block not in seen]
        seen.update(fresh)
        texts.append(("\n\n".join(fresh) + "\n\n").encode())
    return texts


def split() -> tuple[Tensor, Tensor]:
    """Training and validation bytes (1-D, int64). No topic and no paragraph is in both."""
    texts = unique_topics()
    wanted = HELD_OUT * sum(map(len, texts))
    first = len(texts)
    while sum(map(len, texts[first:])) < wanted:
        first -= 1
    return _tokens(texts[:first]), _tokens(texts[first:])


def _tokens(texts: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8).long()


def random_batches(tokens: Tensor, context: int, batch_size: int, *, seed: int, rank: int) -> Iterator[Tensor]:
    """Endless batches of windows (batch_size, context + 1), drawn by a generator of this rank's own."""
    generator = torch.Generator().manual_seed(1_000 * seed + rank)
    offsets = torch.arange(context + 1)
    while True:
        starts = torch.randint(len(tokens) - context, (batch_size, 1), generator=generator)
        yield tokens[starts + offsets]


def validation_batches(tokens: Tensor, context: int, batch_size: int, limit: int | None = None) -> list[Tensor]:
    """All windows in order, side by side, in batches (batch_size, context + 1), without an incomplete last batch."""
    num_windows = (len(tokens) - 1) // context
    starts = torch.arange(num_windows - num_windows % batch_size).unsqueeze(1) * context
    windows = tokens[starts + torch.arange(context + 1)]
    return list(windows.split(batch_size))[:limit]
