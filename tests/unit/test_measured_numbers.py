"""Every measured number in the README and the docs has a command that printed it, in its section; times a day, too.

A number counts as measured by how it is written: with a unit of time, memory, rate or loss, as a percentage, as
"N of M" or "N passed", or with four digits after the point. Those of them that are settings are the code's, below.
Whether a command prints that number no machine sees here: whoever writes one down has just run the command.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest

from sharded_avg.commands.cli import COMMANDS
from tests.unit.test_architecture import ROOT
from tests.unit.test_snippets import PAGES

NUMBER = r"(?<![\w.,-])[+-]?\d(?:[\d,.]*\d)?"
TIME = re.compile(rf"{NUMBER}\s?(?:(?:[nmuµ]?s|min|h|seconds|minutes|hours)\b|[KMGT]i?B/s)")
MEASURED = re.compile(
    rf"{TIME.pattern}|{NUMBER}\s?(?:%|[KMGT]i?B\b|nats\b|times\b)|{NUMBER} of \d[\d,]*"
    rf"|{NUMBER} (?:passed|failed|skipped)\b|(?<![\w.])[+-]?\d+\.\d{{4}}\b"
)
DAY, MACHINE = r"\b20\d\d-\d\d-\d\d\b", r"\b(?:cores?|H[12]00)\b"
BOUNDS, WAYS = "sharded_avg.ranks.bounds", "sharded_avg.exchange.ways"
SETTINGS = {
    ("docs/design.md", "1 MiB"): (WAYS, "CACHE_BYTES"),
    ("docs/design.md", "64 MiB"): (WAYS, "SCRATCH_BYTES"),
    ("docs/design.md", "30 seconds"): (BOUNDS, "LEAVING_GRACE_S"),
    ("docs/design.md", "30 s"): (BOUNDS, "LEAVING_GRACE_S"),
    ("docs/design.md", "1200 s"): (BOUNDS, "PATIENCE_S"),
    ("docs/design.md", "300 s"): (BOUNDS, "TRAFFIC_S"),
    ("docs/files.md", "16 MiB"): ("sharded_avg.files.source", "SLAB_BYTES"),
    ("docs/guide.md", "30 seconds"): (BOUNDS, "LEAVING_GRACE_S"),
    ("docs/guide.md", "64 MiB"): (WAYS, "SCRATCH_BYTES"),
    ("docs/lightning.md", "30 seconds"): (BOUNDS, "LEAVING_GRACE_S"),
}


def sections(text: str) -> Iterator[str]:
    """The text from each heading to the next; what begins with # in a block is none."""
    blank = re.sub(r"^```.*?^```$", lambda block: re.sub(r"[^\n]", "-", block[0]), text, flags=re.MULTILINE | re.DOTALL)
    starts = [0, *(found.start() for found in re.finditer(r"^#+ ", blank, re.MULTILINE)), len(text)]
    yield from (text[start:stop] for start, stop in pairwise(starts))


def numbers(page: str, section: str) -> list[str]:
    """What was measured: in the text, in tables, and in what a program printed; not in code, nor in links."""
    section = re.sub(r"^```\w+\n.*?^```$", "", section, flags=re.MULTILINE | re.DOTALL)
    section = re.sub(r"`[^`\n]*`|\]\(\S*?\)", "", section)
    return [found for found in MEASURED.findall(section) if (page, found) not in SETTINGS]


def commands(section: str) -> dict[str, bool]:
    """Which commands of this checkout a section names, and whether it has them."""
    found = {}
    for command, module in re.findall(r"(python -m ((?:tests|sharded_avg)[\w.]*\w))", section):
        path = ROOT.joinpath(*module.split("."))
        found[command] = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
    for command, file in re.findall(r"((?:python|torchrun|deepspeed) [^\n`]*?(examples/\w+\.py))", section):
        found[command] = (ROOT / file).exists()
    for command, name in re.findall(r"(/usr/bin/time [^\n`]*?sharded-avg ([a-z]+))", section):
        found[command] = name in {module.__name__.rpartition(".")[2] for module in COMMANDS}
    for command, target in re.findall(r"(?:`|^    )(make ([a-z-]+))", section, re.MULTILINE):
        found[command] = f"\n{target}:" in (ROOT / "Makefile").read_text()
    return found


def complaints(page: str, text: str) -> list[str]:
    """What is wrong with a page."""
    wrong = []
    for section in sections(text):
        measured, named = numbers(page, section), commands(section)
        where = f"{page}, {section.partition(chr(10))[0]!r}"
        if measured and not named:
            wrong.append(f"{where}: no command printed {', '.join(measured)}")
        if TIME.search(" ".join(measured)) and not (re.search(DAY, section) and re.search(MACHINE, section)):
            wrong.append(f"{where}: times without a date or a machine")
        wrong += [f"{where}: {command} is not there" for command, exists in named.items() if not exists]
    return wrong


@pytest.mark.parametrize("page", PAGES)
def test_measured_numbers_have_their_command(page: str) -> None:
    assert not complaints(page, (ROOT / page).read_text())


@pytest.mark.parametrize(("where", "constant"), SETTINGS.items(), ids=" ".join)
def test_settings_are_those_of_the_code(where: tuple[str, str], constant: tuple[str, str]) -> None:
    page, text = where
    number, unit = text.split()
    assert text in (ROOT / page).read_text(), "gone: take it out of SETTINGS"
    assert getattr(importlib.import_module(constant[0]), constant[1]) == int(number) * (2**20 if unit == "MiB" else 1)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("It takes 5 ms on two cores, 2026-11-27.", "no command printed 5 ms"),
        ("## Here\n`make bench`\n## There\nIt saves 12 %.", "'## There': no command printed 12 %"),
        ("```\nswap 46%\n```", "no command printed 46%"),
        ("It takes 5 ms (`make bench`).", "times without a date or a machine"),
        ("Loss 1.9629, by `python examples/gone.py`.", "examples/gone.py is not there"),
        ("Loss 1.9629.\n\n    make gone\n", "make gone is not there"),
    ],
)
def test_a_page_that_does_not_say_is_noticed(text: str, complaint: str) -> None:
    """Or the check could not fail."""
    assert any(complaint in found for found in complaints("page", text))
    assert not complaints("page", "`make bench`, two cores, 2026-11-27: 5 ms, `30 s` in code")
