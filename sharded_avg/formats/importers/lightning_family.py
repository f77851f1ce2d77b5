"""Averages in the .ckpt files of Lightning and of what is built on it.

LightningImporter     WeightAveraging and EMAWeightAveraging: `state_dict` is the average
LightningSwaImporter  StochasticWeightAveraging: the average is in the callback's state
NemoImporter          NeMo's EMA callback: the -EMA.ckpt file
LitEmaImporter        CompVis' and Stability's LitEma: names without dots, matched with those of the model
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ...files.facts import METADATA_KEY
from ...files.source import AbstractSource
from .base import AbstractImporter, Content, Names, as_number, ema_rule, in_order, is_state, numbered


class LightningImporter(AbstractImporter):
    """`state_dict` is the average, `current_model_state` is raw, `averaging_state` has `n_averaged`.

    Saved with weights only by our callback, it has the average only, and says so.
    """

    format = "lightning"
    about = "Lightning's WeightAveraging and EMAWeightAveraging: state_dict"

    def claims(self, content: Content) -> bool:
        if content.at(METADATA_KEY, "weights") == "average":
            return is_state(content.at("state_dict"))
        return all(is_state(content.at(key)) for key in ("state_dict", "current_model_state")) and isinstance(
            content.at("averaging_state"), dict
        )

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        place = "averaging_state" if content.at("averaging_state") is not None else METADATA_KEY
        n_averaged = self.started(content, content.number(place, "n_averaged"))
        step = content.number("global_step")
        return self.found(content, content.under("state_dict."), n_averaged=n_averaged, step=step)


class LightningSwaImporter(AbstractImporter):
    """`callbacks[...]["average_model_state"]`; `state_dict` is raw until training ends."""

    format = "lightning_swa"
    about = "Lightning's StochasticWeightAveraging: callbacks[...]['average_model_state']"

    def claims(self, content: Content) -> bool:
        return bool(self._callbacks(content))

    @staticmethod
    def _callbacks(content: Content) -> list[str]:
        callbacks = content.at("callbacks")
        entries = callbacks.items() if isinstance(callbacks, dict) else ()
        return [key for key, value in entries if isinstance(value, dict) and "average_model_state" in value]

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        keys = self._callbacks(content)
        if len(keys) != 1:
            raise content.refuse(f"it holds the state of {len(keys)} StochasticWeightAveraging callbacks, not of one")
        n_averaged = self.started(content, content.number("callbacks", keys[0], "n_averaged"))
        flats = content.under(f"callbacks.{keys[0]}.average_model_state.")
        facts = {"n_averaged": n_averaged, "step": content.number("global_step"), "rule": {"kind": "SWA"}}
        return self.found(content, flats, **facts)


class NemoImporter(AbstractImporter):
    """`optimizer_states[i]["ema"]` lists the average in optimizer order; in an -EMA.ckpt `state_dict` is the same.

    Where the two differ, the file was written beside NeMo's own checkpoint callback, and `state_dict` is raw.
    """

    format = "nemo"
    about = "NeMo's EMA callback: state_dict of the -EMA.ckpt file"
    numbered = True

    def claims(self, content: Content) -> bool:
        return is_state(content.at("state_dict")) and bool(list(_ema_optimizers(content)))

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        optimizers = dict(_ema_optimizers(content))
        lists = {index: numbered(content.source.infos, f"optimizer_states.{index}.ema.") for index in optimizers}
        flats = [flat for found in lists.values() for flat in found]
        first = next(iter(optimizers.values()), {})
        step = self.started(content, as_number(first.get("current_step")))
        every = int(as_number(first.get("every_n_steps")) or 1)
        n_averaged = None if step is None else -(-step // every)
        facts = {"step": step, "n_averaged": n_averaged, "rule": ema_rule(as_number(first.get("decay")))}
        if not flats or _all_among(content, flats, list(content.under("state_dict.").values())):
            return self.found(content, content.under("state_dict."), **facts)
        pairs = in_order(content, flats, names, "optimizer_states[...]['ema'] (its state_dict is raw)")
        return self.found(content, pairs, **facts)


def _ema_optimizers(content: Content) -> Iterator[tuple[int, dict[str, Any]]]:
    states = content.at("optimizer_states")
    for index, state in enumerate(states if isinstance(states, (list, tuple)) else ()):
        if isinstance(state, dict) and {"ema", "decay", "current_step", "every_n_steps"} <= state.keys():
            yield index, state


def _all_among(content: Content, flats: list[str], candidates: list[str]) -> bool:
    """Whether each tensor of `flats` has the values of some candidate; one at a time is in memory with its match."""
    source = content.source
    return all(
        any(
            source.infos[flat] == source.infos[other] and torch.equal(source.read(flat), source.read(other))
            for other in candidates
        )
        for flat in flats
    )


class LitEmaImporter(AbstractImporter):
    """`model_ema.<name of a parameter without its dots>`, and `model_ema.decay`, `model_ema.num_updates`."""

    format = "lit_ema"
    about = "CompVis' and Stability's LitEma: model_ema.* without dots"

    def claims(self, content: Content) -> bool:
        return self._prefix(content) is not None

    @staticmethod
    def _prefix(content: Content) -> str | None:
        """What stands before `model_ema.`: the file is a .ckpt, or a bare state dict (also as safetensors)."""
        flats = content.source.infos
        ends = ("model_ema.decay", "model_ema.num_updates")
        return next((p for p in ("state_dict.", "") if all(p + end in flats for end in ends)), None)

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        prefix = self._prefix(content)
        prefix = "" if prefix is None else prefix
        flat_ema = content.under(f"{prefix}model_ema.")
        decay, count = flat_ema.pop("decay", None), flat_ema.pop("num_updates", None)
        num_updates = None if count is None else content.scalar(count)
        raw = {name: flat for name, flat in content.under(prefix).items() if not name.startswith("model_ema.")}
        n_averaged = self.started(content, None if num_updates == -1 else num_updates)  # -1: it did not count
        rule = ema_rule(None if decay is None else content.scalar(decay))
        return self.found(content, _matched(content, flat_ema, raw), n_averaged=n_averaged, rule=rule)


def _matched(content: Content, ema: dict[str, str], raw: dict[str, str]) -> dict[str, str]:
    """The model's names for names without dots: LitEma's are relative to the submodule that it averages."""
    parents = {""} | {name[: index + 1] for name in raw for index, char in enumerate(name) if char == "."}
    found = []
    for parent in sorted(parents):
        dotless = _dotless(raw, parent)
        if all(len(dotless.get(short, ())) == 1 for short in ema):
            pairs = {dotless[short][0]: flat for short, flat in ema.items()}
            if all(content.source.infos[raw[n]].shape == content.source.infos[f].shape for n, f in pairs.items()):
                found.append(pairs)
    if len(found) != 1:
        how = "match no parameters, or more than one each," if not found else f"match {len(found)} submodules"
        raise content.refuse(
            f"the names of its average, {next(iter(ema), '')!r} and so on, have lost their dots, and {how} among the "
            "names of the model in the same file. Load it with the code that wrote it and save the average by name"
        )
    return found[0]


def _dotless(raw: dict[str, str], parent: str) -> dict[str, list[str]]:
    dotless: dict[str, list[str]] = {}
    for name in raw:
        if name.startswith(parent):
            dotless.setdefault(name.removeprefix(parent).replace(".", ""), []).append(name)
    return dotless
