"""What comes of every failure, as a table of counts: methods x ways to fail x engines, on the first and the last rank.

    python -m tests.multigpu.failing.table [--log FILE] [--only TEXT] [--print]

--log     outcomes are appended to it, a line of JSON for each row; rows that are in it are not run again
--only    rows whose name contains it: "fsdp2-3", "summon", "Ctrl-C", "asked"; may be given several times
--print   only count what is in the log
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from tests.helpers import pool
from tests.helpers.engines import ENGINES

from .ends import FINE, HARM, Outcome
from .test_anywhere import FAULTS, ROWS, SWEPT, is_users, swept
from .test_ways import tried
from .ways import WAYS

Row = tuple[str, int, str, str]  # engine, ranks, call or "", fault or kind of ways


def rows() -> Iterator[Row]:
    """One kind of pool after the other."""
    for engine, size in sorted(ROWS, key=lambda row: (ENGINES[row[0]].kind, row[1])):
        for kind in WAYS:
            yield engine, size, "", kind
        for call in SWEPT:
            for fault in FAULTS:
                if not is_users(call, engine):
                    yield engine, size, call, fault


def run(row: Row) -> list[Outcome]:
    """All outcomes of one row; a row whose ranks do not come to its end is one that hung."""
    engine, size, call, what = row
    folder = Path(tempfile.mkdtemp(prefix="failing-"))
    try:
        return swept(call, engine, size, what, folder) if call else tried(what, engine, size, folder)
    except pool.RanksFailedError as error:
        verdict = "hung" if "hung: not done" in str(error) else "wrong error"
        return [Outcome(call or what, f"{what}: the whole row", -1, verdict, told=str(error))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def table(found: dict[str, list[Outcome]]) -> str:
    """Counts by engine; what is left undone, and in which words; and whatever is not fine."""
    heads = ("total", *HARM, *FINE, "longest, s")
    lines = ["| engine, ranks | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    by_engine: dict[str, list[Outcome]] = {}
    for row, outcomes in found.items():
        by_engine.setdefault(" ".join(row.split(" ")[:2]), []).extend(outcomes)
    by_engine["all"] = [outcome for outcomes in by_engine.values() for outcome in outcomes]
    for engine, outcomes in by_engine.items():
        counts = Counter(outcome.verdict for outcome in outcomes)
        longest_s = max((outcome.took_s for outcome in outcomes), default=0.0)
        cells = [len(outcomes), *(counts[verdict] for verdict in (*HARM, *FINE)), f"{longest_s:.2f}"]
        lines.append(f"| {engine} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", *_listed(by_engine["all"])])


def _listed(outcomes: Iterable[Outcome]) -> Iterator[str]:
    undone: Counter[tuple[str, str]] = Counter()
    for outcome in outcomes:
        if outcome.verdict in ("said", "late"):
            undone[outcome.verdict, outcome.call] += 1
        elif outcome.verdict not in FINE:
            yield f"{outcome.verdict.upper()}: {outcome.call}, {outcome.way}, on rank {outcome.fails}\n{outcome.told}\n"
    for (verdict, call), number in sorted(undone.items()):
        yield f"{verdict}: {number} of {call}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log", type=Path)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--print", action="store_true", dest="is_print")
    arguments = parser.parse_args()
    found: dict[str, list[Outcome]] = {}
    if arguments.log is not None and arguments.log.exists():
        for line in arguments.log.read_text().splitlines():
            row, outcomes = json.loads(line)
            found[row] = [Outcome(**outcome) for outcome in outcomes]
    try:
        for each in [] if arguments.is_print else rows():
            name = " ".join(map(str, each)).replace("  ", " ")
            if name in found or not all(text in name for text in arguments.only):
                continue
            found[name] = run(each)
            counts = Counter(outcome.verdict for outcome in found[name])
            print(f"{name}: {dict(counts)}", file=sys.stderr, flush=True)
            if arguments.log is not None:
                with arguments.log.open("a") as log:
                    log.write(json.dumps([name, [asdict(outcome) for outcome in found[name]]]) + "\n")
    finally:
        pool.close_all()
    print(table(found))
    return int(any(outcome.verdict in HARM for outcomes in found.values() for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
