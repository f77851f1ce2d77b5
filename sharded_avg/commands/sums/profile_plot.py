"""Pictures of profiles: which share of an average each moment of training has; wanted, reached, or saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...files.sinks import appearing
from ...rules.power_profiles import Mixture, sigma_rel_of
from ...version import how_to_install

_NUM_POINTS = 1000


def require_matplotlib() -> Any:
    """matplotlib's figures, which need no display. Raises `ConfigError` if it is not installed."""
    try:
        return import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError(f"a picture needs matplotlib. Install it with: {how_to_install('matplotlib')}") from error


def draw_profiles(mixture: Mixture, path: Path) -> None:
    """Write the picture, in the format that the ending of `path` names. Raises `ConfigError` for an unknown one."""
    figure = require_matplotlib().Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    length = mixture.target.length
    times = [(i + 0.5) / _NUM_POINTS * length for i in range(_NUM_POINTS)]
    wanted = f"wanted: sigma_rel {sigma_rel_of(mixture.target.gamma):.4g}"
    axes.plot(times, [mixture.target.at(time) for time in times], label=wanted, linewidth=3, alpha=0.5)
    axes.plot(times, [mixture.at(time) for time in times], label=f"reached: off by {100 * mixture.error:.2g} %")
    saved = sorted({profile.length for profile in mixture.profiles})
    axes.plot(saved, [0.0] * len(saved), "|", color="black", markersize=12, label="saved")
    axes.set_xlabel("update")
    axes.set_ylabel("share of the average")
    axes.legend()
    _write(figure, path)


def draw_shares(profiles: Mapping[str, Sequence[tuple[int, int, float]]], path: Path) -> None:
    """The same of saved averages by name: (first step, last step, share) of each stretch."""
    figure = require_matplotlib().Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, stretches in profiles.items():
        per_step = [share / (last - first + 1) for first, last, share in stretches]
        axes.stairs(per_step, [stretches[0][0], *(last + 1 for _, last, _ in stretches)], label=name, linewidth=2)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("share of the average, per step")
    axes.legend()
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    format = path.suffix.removeprefix(".") or "png"
    if format not in figure.canvas.get_supported_filetypes():
        raise ConfigError(
            f"--plot {str(path)!r}: no picture has the ending {path.suffix!r}; .png, .svg and .pdf are known"
        )
    with appearing(path) as incoming:
        figure.savefig(incoming, format=format)
