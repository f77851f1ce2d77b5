"""What a run has saved over time: the saved averages in a folder and below it, by step.

Snapshot   one average of one save
Series     all of them, oldest first, and which folders were passed over because they are torn
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..files.dcp_folder import INDEX_FILE
from ..files.source import AbstractSource
from ..rules.power_profiles import Mixture, PowerProfile, gamma_of, gamma_of_rule
from .folder.place import INCOMING, OUTGOING, place_of
from .manifest import AverageRecord
from .sources import SavedAverages, saved_averages

_MAX_DEPTH = 3


@dataclass(frozen=True)
class Snapshot:
    """The average `name` of one save."""

    saved: SavedAverages
    name: str

    @property
    def path(self) -> Path:
        return self.saved.folder.path

    @property
    def step(self) -> int:
        """Optimizer steps that training had made."""
        return self.saved.manifest.step

    @property
    def record(self) -> AverageRecord:
        return self.saved.manifest.averages[self.name]

    @property
    def gamma(self) -> float | None:
        """Of its rule, if it is a power average (rules/power_profiles.py)."""
        return gamma_of_rule(self.record.rule)

    def source(self) -> AbstractSource:
        """Its tensors. Raises `CheckpointError` if the folder does not hold what the manifest says."""
        return self.saved.source(self.name)


@dataclass(frozen=True)
class Series:
    """`snapshots` by step and name; `torn`: folders that hold a save which was cut short or is damaged, with why."""

    snapshots: tuple[Snapshot, ...]
    torn: dict[str, str]

    @classmethod
    def found_in(cls, folder: Path) -> Series:
        """All saved averages in `folder`, or a few levels below it, that have had an update.

        Raises `CheckpointError` if `folder` is none, or if two saves count the updates up to one step differently:
        then they are not of one run.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{str(folder)!r} is no folder")
        found, torn = [], {}
        for path in _candidates(folder, _MAX_DEPTH):
            try:
                saved = saved_averages(path)
                if saved is None and _has_pieces(path) and not (path / INDEX_FILE).exists():
                    raise CheckpointError(f"{str(path)!r} has no index: a save that was cut short")
                names = [] if saved is None else [n for n, r in saved.manifest.averages.items() if r.n_averaged]
                snapshots = [Snapshot(saved, name) for name in names if saved is not None]
                for snapshot in snapshots:
                    snapshot.source()
                found += snapshots
            except CheckpointError as error:
                torn[str(path)] = str(error)
        found.sort(key=lambda snapshot: (snapshot.step, snapshot.name))
        first: dict[tuple[int, str], Snapshot] = {}
        for snapshot in found:
            other = first.setdefault((snapshot.step, snapshot.name), snapshot)
            if other.record != snapshot.record:
                raise CheckpointError(
                    f"{str(other.path)!r} and {str(snapshot.path)!r} both have {snapshot.name!r} at step "
                    f"{snapshot.step}, and count its updates differently: these are two runs. Name the folder of one"
                )
        return cls(tuple(first.values()), torn)

    def mixed(self, sigma_rel: float, step: int | None = None) -> tuple[tuple[Snapshot, ...], Mixture]:
        """Saved power averages, and the coefficients with which their sum is the one of another width.

        Of saves up to `step`, by default all; the target ends at the last of them. Raises `ConfigError` for a
        `sigma_rel` that there is not, and `CheckpointError` as `power_averages`.
        """
        snapshots = self.power_averages(step)
        profiles = [PowerProfile(snapshot.gamma or 0.0, snapshot.record.n_averaged) for snapshot in snapshots]
        target = PowerProfile(gamma_of(sigma_rel), max(profile.length for profile in profiles))
        return snapshots, Mixture.of(profiles, target)

    def power_averages(self, step: int | None = None) -> tuple[Snapshot, ...]:
        """Those that can be mixed, of saves up to `step`.

        Raises `CheckpointError` if there are none, or if they have not counted the same updates: then there is no
        common time.
        """
        mixable = [snapshot for snapshot in self.snapshots if snapshot.gamma is not None]
        if not mixable:
            found = sorted({str(snapshot.record.rule) for snapshot in self.snapshots}) or "nothing"
            raise CheckpointError(
                f"there are no saved power averages to mix (PowerAverage with a power above 1/2, SWA), but {found}"
            )
        until = tuple(snapshot for snapshot in mixable if step is None or snapshot.step <= step)
        if not until:
            raise CheckpointError(
                f"there is no saved power average up to step {step}: the first is of {mixable[0].step}"
            )
        lengths: dict[int, int] = {}
        for snapshot in until:
            if lengths.setdefault(snapshot.step, snapshot.record.n_averaged) != snapshot.record.n_averaged:
                raise CheckpointError(
                    f"at step {snapshot.step} {snapshot.name!r} has had {snapshot.record.n_averaged} updates, and "
                    f"another average {lengths[snapshot.step]}: they began at different times, or are of two runs"
                )
        if list(lengths.values()) != sorted(lengths.values()):
            raise CheckpointError(
                f"the saves are of two runs, or of an average that began anew: their updates by step are {lengths}"
            )
        return until

    def steps(self) -> list[int]:
        """At which something was saved."""
        return sorted({snapshot.step for snapshot in self.snapshots})


def _candidates(folder: Path, depth: int) -> Iterator[Path]:
    """Folders that are, or were to become, a checkpoint; what is inside of one is none."""
    place = place_of(folder)
    if place.whole() or Path(place.incoming).exists() or (folder / INDEX_FILE).exists() or _has_pieces(folder):
        yield folder
    elif depth and folder.is_dir():
        inside = [entry for entry in folder.iterdir() if entry.is_dir()]
        names = {entry.with_name(entry.name.removesuffix(INCOMING).removesuffix(OUTGOING)) for entry in inside}
        for path in sorted(names):
            yield from _candidates(path, depth - 1)


def _has_pieces(folder: Path) -> bool:
    return any(folder.glob("*.distcp"))
