"""A picture of the profile that was wanted, and of the one that is reached."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...files.sinks import appearing
from ...rules.power_profiles import Mixture, sigma_rel_of

_NUM_POINTS = 1000


def require_matplotlib() -> Any:
    """matplotlib's figures, which need no display. Raises `ConfigError` if it is not installed."""
    try:
        return import_module("matplotlib.figure")
    except ImportError as error:
        raise ConfigError("a picture needs matplotlib. Install it with: pip install 'sharded-avg[plots]'") from error


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
    format = path.suffix.removeprefix(".") or "png"
    if format not in figure.canvas.get_supported_filetypes():
        raise ConfigError(
            f"--plot {str(path)!r}: no picture has the ending {path.suffix!r}; .png, .svg and .pdf are known"
        )
    with appearing(path) as incoming:
        figure.savefig(incoming, format=format)
