"""Averages in Composer's checkpoints, where the algorithms keep them or have swapped them into the model.

ComposerImporter  EMA: the algorithm's dicts, or `state.model` while `ema_weights_active`; SWA: `swa_model`
"""

from __future__ import annotations

from typing import Any

from ...files.source import AbstractSource
from .base import AbstractImporter, Content, Names, is_state


class ComposerImporter(AbstractImporter):
    """`state["algorithms"]` lists (name, state); checkpoints are written while the EMA is swapped in."""

    format = "composer"
    about = "Composer's EMA and SWA: state['algorithms'], or state['model'] while ema_weights_active"

    def claims(self, content: Content) -> bool:
        return bool(_algorithms(content))

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        algorithms = _algorithms(content)
        if len(algorithms) != 1:
            raise content.refuse(f"it holds the states of {sorted(algorithms)}: one of EMA and SWA was expected")
        name, (prefix, state) = next(iter(algorithms.items()))
        step = content.number("state", "timestamp", "Timestamp", "batch")
        if name == "EMA":
            return self.found(content, self._ema(content, prefix, state), step=step)
        return self._swa(content, prefix, state)

    def _ema(self, content: Content, prefix: str, state: dict[str, Any]) -> dict[str, str]:
        if state.get("ema_started") is False:
            self.started(content, 0)
        active = state.get("ema_weights_active")
        if not isinstance(active, bool):
            raise content.refuse(f"ema_weights_active is {active!r}, so it does not say which weights are the average")
        if active:  # what the algorithm then holds is raw
            return content.under("state.model.")
        own = content.under(f"{prefix}ema_model.named_parameters_dict.", f"{prefix}ema_model.named_buffers_dict.")
        return own or content.under(f"{prefix}ema_model.")  # before 0.13

    def _swa(self, content: Content, prefix: str, state: dict[str, Any]) -> AbstractSource:
        model = state.get("swa_model")
        if not is_state(model):
            raise content.refuse("its SWA has not begun: swa_model is empty. Use a later checkpoint")
        n_averaged = self.started(content, content.scalar(f"{prefix}swa_model.n_averaged"))
        flats = content.under(f"{prefix}swa_model.module.")
        return self.found(content, flats, n_averaged=n_averaged, rule={"kind": "SWA"})


def _algorithms(content: Content) -> dict[str, tuple[str, dict[str, Any]]]:
    """The states of EMA and SWA by name, each with the flat prefix that leads to it."""
    listed = content.at("state", "algorithms")
    found = {}
    for index, entry in enumerate(listed) if isinstance(listed, (list, tuple)) else ():
        if isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], dict):
            name, state = entry
            if (name == "EMA" and "ema_model" in state) or (name == "SWA" and "swa_model" in state):
                found[name] = f"state.algorithms.{index}.1.", state
    return found
