"""Averages that describe themselves wherever they lie in a file: at the top, under any key, below any submodule's name.

AveragedModelImporter  torch.optim.swa_utils.AveragedModel, torchtnt
EmaPytorchImporter     ema-pytorch
ShadowImporter         torch_ema, and the raw state of diffusers' and SimpleTuner's EMAModel: numbered, not named
"""

from __future__ import annotations

import re

from ...files.source import AbstractSource
from .base import AbstractImporter, Content, Names, ema_rule, in_order, numbered


class AveragedModelImporter(AbstractImporter):
    """`module.<name>` and `n_averaged`."""

    format = "averaged_model"
    about = "torch.optim.swa_utils.AveragedModel: module.*"

    def places(self, content: Content) -> list[str]:
        return [place for place in content.places_of("n_averaged") if content.under(f"{place}module.")]

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        place = self.place(content)
        n_averaged = self.started(content, content.number(f"{place}n_averaged"))
        return self.found(content, content.under(f"{place}module."), n_averaged=n_averaged)


class EmaPytorchImporter(AbstractImporter):
    """`ema_model.<name>`, `initted`, `step`, and perhaps `online_model.<name>`, which is raw."""

    format = "ema_pytorch"
    about = "ema-pytorch's EMA and PostHocEMA: ema_model.*"

    def places(self, content: Content) -> list[str]:
        steps = content.places_of("step")
        places = [place for place in content.places_of("initted") if place in steps]
        return [place for place in places if content.under(f"{place}ema_model.")]

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        place = self.place(content)
        self.started(content, content.number(f"{place}initted"))
        step = content.number(f"{place}step")
        if isinstance(step, float):  # PostHocEMA rounds it to fp16; the exact one is in the name, INDEX.STEP.pt
            named = re.fullmatch(r"\d+\.(\d+)\.(pt|safetensors)", content.path.name)
            step = int(named[1]) if named else None
        return self.found(content, content.under(f"{place}ema_model."), step=step)


class ShadowImporter(AbstractImporter):
    """A list `shadow_params` in parameter order. A list `collected_params` is raw: it was set aside by a swap."""

    numbered = True

    def __init__(self, format: str, about: str, counter: str) -> None:
        self.format = format
        self.about = about
        self._counter = counter

    def places(self, content: Content) -> list[str]:
        return [place for place in content.places_of(self._counter) if content.under(f"{place}shadow_params.")]

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        place = self.place(content)
        step = self.started(content, content.number(place + self._counter))
        late = content.number(f"{place}update_after_step") or 0
        pairs = in_order(content, numbered(content, f"{place}shadow_params."), names, "a list, shadow_params")
        rule = ema_rule(content.number(f"{place}decay"))
        n_averaged = None if step is None else max(step - int(late), 1)
        return self.found(content, pairs, n_averaged=n_averaged, step=step, rule=rule)
