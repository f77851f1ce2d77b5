"""Averages in the .ckpt files of Lightning and of what is built on it.

LightningImporter     WeightAveraging and EMAWeightAveraging: `state_dict` is the average
LightningSwaImporter  StochasticWeightAveraging: the average is in the callback's state
NemoImporter          NeMo's EMA callback: the -EMA.ckpt file
LitEmaImporter        CompVis' and Stability's LitEma: names without dots, matched with those of the model
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch

from ...errors import CheckpointError
from ...files.facts import METADATA_KEY
from ...files.source import AbstractSource
from ...files.stored import Stored
from ...saved.manifest import Manifest
from ...saved.plain import decode, encode
from ...weights.names import clean
from .base import AbstractImporter, Content, Names, ema_rule, in_order, is_state, numbered

_MAX_OPTIMIZERS = 100


class LightningImporter(AbstractImporter):
    """`state_dict` is the average, `current_model_state` is raw, `averaging_state` has `n_averaged`.

    Saved with weights only by our callback, it has the average only, and says so.
    """

    format = "lightning"
    about = "Lightning's WeightAveraging and EMAWeightAveraging: state_dict"

    def places(self, content: Content) -> list[str]:
        is_ours = content.at(f"{METADATA_KEY}.weights") == "average"
        beside = is_state(content.at("current_model_state")) and isinstance(content.at("averaging_state"), dict)
        return ["state_dict."] if is_state(content.at("state_dict")) and (is_ours or beside) else []

    def named(self, content: Content) -> dict[str, str]:
        """Our callback's, where it keeps several: `state_dict` is the one that training ends with."""
        main, kept = content.at(f"{METADATA_KEY}.main"), content.at(f"{METADATA_KEY}.averages")
        if not isinstance(main, str) or not isinstance(kept, dict):
            return {}
        others = [name for name in kept if "/" not in str(name)]  # and not the snapshots of one
        return {main: "state_dict.", **{str(name): f"{METADATA_KEY}.averages.{name}." for name in others}}

    def average_of(self, content: Content, name: str) -> AbstractSource:
        """That one; what is not averaged is as in `state_dict`."""
        rest = {clean(key): path for key, path in content.under("state_dict.").items()}
        return self.found(content, rest | content.under(self.named(content)[name]))

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        where = "averaging_state" if content.at("averaging_state") is not None else METADATA_KEY
        n_averaged = self.started(content, content.number(f"{where}.n_averaged"))
        step = content.number("global_step")
        facts = {"n_averaged": n_averaged, "step": step, **self._told(content)}
        source = self.found(content, content.under(self.place(content)), **facts)
        source.extra = dict(self._extra(content.at("state_dict") or {}))
        return source

    def _told(self, content: Content) -> dict[str, Any]:
        """What the manifest says that our callback leaves: rule and steps, and where there are several, of each."""
        try:
            manifest = Manifest.from_json(content.at(f"{METADATA_KEY}.manifest"))
        except CheckpointError:  # Lightning's own callback leaves none, a later version another one
            return {}
        records = {
            name: {"n_averaged": record.n_averaged, "rule": dict(record.rule), "updates": record.updates}
            for name, record in manifest.averages.items()
        }
        if len(records) == 1:
            return next(iter(records.values()))
        return {"averages": records, **records.get(next(iter(self.named(content)), ""), {})}

    @staticmethod
    def _extra(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """What modules keep by `get_extra_state`, where it is no tensor and no class has to be run for it."""
        for key, value in state.items():
            if key.endswith("_extra_state") and not isinstance(value, Stored):
                with suppress(TypeError):
                    yield clean(key), decode(encode(value))


class LightningSwaImporter(AbstractImporter):
    """`callbacks[...]["average_model_state"]`; `state_dict` is raw until training ends."""

    format = "lightning_swa"
    about = "Lightning's StochasticWeightAveraging: callbacks[...]['average_model_state']"

    def places(self, content: Content) -> list[str]:
        callbacks = content.at("callbacks")
        states = callbacks.items() if isinstance(callbacks, dict) else ()
        keys = [key for key, value in states if isinstance(value, dict) and "average_model_state" in value]
        keys += [key.partition(".average_model_state.")[0] for key, _ in states if ".average_model_state." in str(key)]
        return [f"callbacks.{key}." for key in dict.fromkeys(keys)]

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        place = self.place(content)
        n_averaged = self.started(content, content.number(f"{place}n_averaged"))
        facts = {"n_averaged": n_averaged, "step": content.number("global_step"), "rule": {"kind": "SWA"}}
        return self.found(content, content.under(f"{place}average_model_state."), **facts)


class NemoImporter(AbstractImporter):
    """`optimizer_states[i]["ema"]` lists the average in optimizer order; in an -EMA.ckpt `state_dict` is the same.

    Where the two differ, the file was written beside NeMo's own checkpoint callback, and `state_dict` is raw.
    """

    format = "nemo"
    about = "NeMo's EMA callback: state_dict of the -EMA.ckpt file"
    numbered = True

    def places(self, content: Content) -> list[str]:
        return ["state_dict."] if is_state(content.at("state_dict")) and self._optimizers(content) else []

    @staticmethod
    def _optimizers(content: Content) -> list[str]:
        """The prefixes of the optimizers that have an average."""
        found = []
        for index in range(_MAX_OPTIMIZERS):
            state = content.at(f"optimizer_states.{index}")
            heads = {str(key).partition(".")[0] for key in state} if isinstance(state, dict) else set()
            if heads >= {"ema", "decay", "current_step", "every_n_steps"}:
                found.append(f"optimizer_states.{index}.")
        return found

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        place = self.place(content)
        optimizers = self._optimizers(content)
        averages = [path for prefix in optimizers for path in numbered(content, f"{prefix}ema.")]
        step = self.started(content, content.number(f"{optimizers[0]}current_step"))
        every = int(content.number(f"{optimizers[0]}every_n_steps") or 1)
        n_averaged = None if step is None else -(-step // every)
        rule = ema_rule(content.number(f"{optimizers[0]}decay"))
        facts = {"step": step, "n_averaged": n_averaged, "rule": rule}
        state = content.under(place)
        infos, read = content.source.infos, content.source.read
        # One tensor at a time is in memory with its match.
        in_state = all(
            any(infos[path] == infos[other] and torch.equal(read(path), read(other)) for other in state.values())
            for path in averages
        )
        if in_state:
            return self.found(content, state, **facts)
        pairs = in_order(content, averages, names, "optimizer_states[...]['ema'] (its state_dict is raw)")
        return self.found(content, pairs, **facts)


class LitEmaImporter(AbstractImporter):
    """`model_ema.<name of a parameter without its dots>`, and `model_ema.decay`, `model_ema.num_updates`."""

    format = "lit_ema"
    about = "CompVis' and Stability's LitEma: model_ema.* without dots"

    def places(self, content: Content) -> list[str]:
        """What stands before `model_ema.`: the file is a .ckpt, or a bare state dict."""
        paths, ends = content.source.infos, ("model_ema.decay", "model_ema.num_updates")
        return [place for place in ("state_dict.", "") if all(place + end in paths for end in ends)]

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        place = self.place(content)
        dotless = content.under(f"{place}model_ema.")
        decay, num_updates = content.number(dotless.pop("decay")), content.number(dotless.pop("num_updates"))
        raw = {name: path for name, path in content.under(place).items() if not name.startswith("model_ema.")}
        n_averaged = self.started(content, None if num_updates == -1 else num_updates)  # -1: it did not count
        return self.found(content, _matched(content, dotless, raw), n_averaged=n_averaged, rule=ema_rule(decay))


def _matched(content: Content, ema: dict[str, str], raw: dict[str, str]) -> dict[str, str]:
    """The model's names for names without dots: LitEma's are relative to the submodule that it averages."""
    infos = content.source.infos
    found = []
    for parent in sorted({""} | {name[: index + 1] for name in raw for index, char in enumerate(name) if char == "."}):
        dotless: dict[str, list[str]] = {}
        for name in raw:
            if name.startswith(parent):
                dotless.setdefault(name.removeprefix(parent).replace(".", ""), []).append(name)
        if all(len(dotless.get(short, ())) == 1 for short in ema):
            pairs = {dotless[short][0]: path for short, path in ema.items()}
            if all(infos[raw[name]].shape == infos[path].shape for name, path in pairs.items()):
                found.append(pairs)
    if len(found) != 1:
        how = "match no parameters, or more than one each," if not found else f"match {len(found)} submodules"
        raise content.refuse(
            f"the names of its average, {next(iter(ema), '')!r} and so on, have lost their dots, and {how} among the "
            "names of the model in the same file. Load it with the code that wrote it and save the average by name"
        )
    return found[0]
