"""Averages in Composer's checkpoints, where the algorithms keep them or have swapped them into the model.

ComposerImporter  EMA: the algorithm's dicts, or `state.model` while `ema_weights_active`; SWA: `swa_model`

Both lists of an EMA, whichever weights are in them, name what it averages: frozen parameters are in the model alone.
"""

from __future__ import annotations

from typing import Any

from ...files.source import AbstractSource
from ...weights.names import clean
from .base import AbstractImporter, Content, Names, is_state

_DDP = "module."


class ComposerImporter(AbstractImporter):
    """`state["algorithms"]` lists (name, state); checkpoints are written while the EMA is swapped in."""

    format = "composer"
    about = "Composer's EMA and SWA: state['algorithms'], or state['model'] while ema_weights_active"

    def places(self, content: Content) -> list[str]:
        return list(_algorithms(content))

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        place = self.place(content)
        state, step = _algorithms(content)[place], content.number("state.timestamp.Timestamp.batch")
        if "swa_model" in state:
            if not is_state(state["swa_model"]):
                raise content.refuse("its SWA has not begun: swa_model is empty. Use a later checkpoint")
            n_averaged = self.started(content, content.number(f"{place}swa_model.n_averaged"))
            flats = content.under(f"{place}swa_model.module.")
            return self.found(content, flats, n_averaged=n_averaged, step=step, rule={"kind": "SWA"})
        if state.get("ema_started") is False:
            self.started(content, 0)
        active = state.get("ema_weights_active")
        if not isinstance(active, bool):
            raise content.refuse(f"ema_weights_active is {active!r}, so it does not say which weights are the average")
        model = f"{place}ema_model."
        in_model = content.under("state.model.")
        trained = _as_in(in_model, content.under(f"{model}named_parameters_dict."))
        held = content.under(f"{model}named_parameters_dict.", f"{model}named_buffers_dict.")
        held = _as_in(in_model, held or content.under(model))  # without the two dicts: before 0.13
        flats = in_model if active else held  # while it is active, what the algorithm holds is raw
        inside = set(map(clean, flats))
        averaged = [name for name in map(clean, trained) if name in inside] or None
        return self.found(content, flats, averaged=averaged, step=step)


def _as_in(in_model: dict[str, str], held: dict[str, str]) -> dict[str, str]:
    """Under the names of `state["model"]`: under DDP the algorithm looks at the wrapper, whose names have one more."""
    bare = {name.removeprefix(_DDP): path for name, path in held.items()}
    wrapped = all(name.startswith(_DDP) for name in held) and set(map(clean, bare)) <= set(map(clean, in_model))
    return bare if wrapped else held


def _algorithms(content: Content) -> dict[str, dict[str, Any]]:
    """The states of EMA and SWA by the prefix of their paths."""
    listed = content.at("state.algorithms")
    found = {}
    for index, entry in enumerate(listed) if isinstance(listed, (list, tuple)) else ():
        if isinstance(entry, (list, tuple)) and len(entry) == 2 and isinstance(entry[1], dict):
            name, state = entry
            if (name == "EMA" and "ema_model" in state) or (name == "SWA" and "swa_model" in state):
                found[f"state.algorithms.{index}.1."] = state
    return found
