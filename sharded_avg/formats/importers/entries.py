"""Averages that lie in a place of their own: below one key, below one prefix, or in one file.

EntryImporter       one key holds a whole state dict
PrefixImporter      tensors whose paths begin with a prefix
TorchtitanImporter  an optimizer's state of each parameter
MMEngineImporter    `state_dict` is the average, `ema_state_dict` is raw: exchanged on purpose
FairseqImporter     extra_state["ema"], with the fp32 values where there are any
EmaFileImporter     a safetensors file, or a folder of one, that is called an average
DiffusersImporter   a pretrained folder whose config.json has the settings of an EMA
"""

from __future__ import annotations

import re
from typing import Any

from ...files.safetensors_file import SafetensorsFiles
from ...files.source import AbstractSource
from ...files.torch_file import TorchFile
from .base import AbstractImporter, Content, Names, as_number, ema_rule, is_state, is_tensor

_DESCRIBES_ITSELF = {"n_averaged", "initted", "steps", "shadow_params", "num_updates"}
_EMA_SETTINGS = {"decay", "optimization_step", "update_after_step"}  # in diffusers' config.json


class EntryImporter(AbstractImporter):
    """A plain state dict under one of `keys`, the first that there is.

    With `certain`, the key alone could mean something else: then there must be that other key too, or no other at all.
    Where paths are flat, a key may also be the name of a submodule. `as_module` lists those that a submodule could well
    have: they count only if other tensors in the file have all the same names and shapes, or, in files that know no
    dicts, if somebody says so.
    """

    def __init__(
        self, format: str, about: str, *keys: str, certain: str | None = None, as_module: tuple[str, ...] = ()
    ) -> None:
        self.format, self.about, self._keys = format, about, keys
        self._certain, self._as_module = certain, as_module

    def possible_places(self, content: Content) -> list[str]:
        for key in self._keys:
            node, place = content.at(key), None
            if node is None or (key not in content.tree and _DESCRIBES_ITSELF & content.tree.keys()):
                continue
            if is_state(_module_of(node)):
                place = f"{key}.module."
            elif is_state(node) and not _DESCRIBES_ITSELF & node.keys() and not _is_optimizer(node):
                place = f"{key}."
            knows_dicts = isinstance(content.source, TorchFile)
            if place is not None and (not knows_dicts or self._is_entry(content, place)):
                return [place]
        return []

    def places(self, content: Content) -> list[str]:
        places = [place for place in self.possible_places(content) if self._is_entry(content, place)]
        if places and self._certain is not None and content.at(self._certain) is None:
            key = places[0].partition(".")[0]
            return places if all(str(other).partition(".")[0] == key for other in content.tree) else []
        return places

    def _is_entry(self, content: Content, place: str) -> bool:
        """Whether a place is more than the name of a submodule."""
        key = place.partition(".")[0]
        return key not in self._as_module or key in content.tree or _has_twin(content, place)

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        return self.found(content, content.under(self.place(content)), step=content.number("step"))


def _is_optimizer(node: dict[str, Any]) -> bool:
    """Whether the tensors are an optimizer's state of each parameter, as torchtitan's are."""
    return any(name.endswith(".ema_params") for name in node)


def _module_of(node: Any) -> Any:
    """The entries below "module." of a wrapper's state dict, beside which there is nothing but counters."""
    if not isinstance(node, dict):
        return None
    if isinstance(node.get("module"), dict):
        return None if _DESCRIBES_ITSELF & node["module"].keys() else node["module"]
    inside = {key.removeprefix("module."): value for key, value in node.items() if str(key).startswith("module.")}
    rest = {key: value for key, value in node.items() if not str(key).startswith("module.")}
    counters = all("." not in str(key) and (not is_tensor(value) or value.shape == ()) for key, value in rest.items())
    return inside if counters and not _DESCRIBES_ITSELF & node.keys() else None


def _has_twin(content: Content, place: str) -> bool:
    """Whether other tensors, all below one prefix or none, have the same names and shapes as those of a place."""
    infos = content.source.infos
    shapes = {name: infos[path].shape for name, path in content.under(place).items()}
    own = place.partition(".")[0] + "."
    others = [path for path in infos if not path.startswith(own)]
    for prefix in {"", *(f"{path.partition('.')[0]}." for path in others)}:
        beside = {path.removeprefix(prefix): infos[path].shape for path in others if path.startswith(prefix)}
        if shapes in (beside, {name.removeprefix("module."): shape for name, shape in beside.items()}):
            return True
    return False


class PrefixImporter(AbstractImporter):
    """Paths that begin with one of `prefixes`, the first that any has.

    `unsure`: more prefixes, which could mean something else and count only where somebody says what the format is.
    """

    def __init__(self, format: str, about: str, *prefixes: str, unsure: tuple[str, ...] = ()) -> None:
        self.format, self.about, self._prefixes, self._unsure = format, about, prefixes, unsure

    def places(self, content: Content) -> list[str]:
        return [prefix for prefix in self._prefixes if content.under(prefix)][:1]

    def possible_places(self, content: Content) -> list[str]:
        return [prefix for prefix in (*self._prefixes, *self._unsure) if content.under(prefix)][:1]

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        return self.found(content, content.under(self.place(content)), step=content.number("iteration"))


class TorchtitanImporter(AbstractImporter):
    """An optimizer whose state for each parameter holds its average; the later form has buffers, too."""

    format = "torchtitan"
    about = "torchtitan's EMA: ema_optimizer.state.*.ema_params, since August 2026 ema.state.*.ema_params"

    def places(self, content: Content) -> list[str]:
        return [prefix for prefix in ("ema.state.", "ema_optimizer.state.") if self._averages(content, prefix)]

    @staticmethod
    def _averages(content: Content, prefix: str) -> dict[str, str]:
        inside = content.under(prefix).items()
        return {rest.removesuffix(".ema_params"): path for rest, path in inside if rest.endswith(".ema_params")}

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        return self.found(content, self._averages(content, self.place(content)))


class MMEngineImporter(AbstractImporter):
    """The hook exchanges the two before it saves: `ema_state_dict` = {`module.<name>`: raw, `steps`}."""

    format = "mmengine"
    about = "MMEngine's EMAHook: state_dict"

    def places(self, content: Content) -> list[str]:
        other = content.at("ema_state_dict")
        is_hook = isinstance(other, dict) and "steps" in other and is_state(content.at("state_dict"))
        return ["state_dict."] if is_hook else []

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        place = self.place(content)
        n_averaged = self.started(content, content.number("ema_state_dict.steps"))
        return self.found(content, content.under(place), n_averaged=n_averaged, step=content.number("meta.iter"))


class FairseqImporter(AbstractImporter):
    """`extra_state["ema"]`, in the model's dtype, and `extra_state["ema_fp32_params"]` where it was kept in fp32."""

    format = "fairseq"
    about = "fairseq: extra_state['ema'], extra_state['ema_fp32_params']"

    def places(self, content: Content) -> list[str]:
        return ["extra_state.ema."] if is_state(content.at("extra_state.ema")) else []

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        return self.found(content, content.under(self.place(content), "extra_state.ema_fp32_params."))


class EmaFileImporter(AbstractImporter):
    """Weights in a file called an average, `ema.safetensors` or `x_ema.safetensors`, or in a folder `x_ema` beside `x`.

    A folder's name alone is no witness: a run called `x_ema` may hold raw weights. Only safetensors: an `ema.pt` of
    some trainers is one rank's shard, which looks like a whole average.
    """

    format = "ema_file"
    about = "Open-Sora, BAGEL, FastVideo, Open-Sora-Plan and others: ema.safetensors, *_ema.safetensors, *_ema/"
    by_keys = False

    def possible_places(self, content: Content) -> list[str]:
        if not isinstance(content.source, SafetensorsFiles):
            raise content.refuse(
                "only a .safetensors file is read as a whole average: a .pt file may be one rank's shard"
            )
        return [""]

    def places(self, content: Content) -> list[str]:
        if not isinstance(content.source, SafetensorsFiles) or content.config.keys() >= _EMA_SETTINGS:
            return []
        if content.path.is_dir():
            folder = content.path.resolve()
            named = folder.name.endswith("_ema") and folder.with_name(folder.name.removesuffix("_ema")).is_dir()
        else:
            stem = content.path.name.partition(".")[0]
            named = re.fullmatch(r"(.+_)?ema(_model)?(_\d+)?", stem) is not None
        return [""] if named else []

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        return self.found(content, content.under(self.place(content)))


class DiffusersImporter(AbstractImporter):
    """What EMAModel.save_pretrained writes: the averaged model, and the settings of the EMA in its config.json."""

    format = "diffusers"
    about = "diffusers' EMAModel.save_pretrained: the folder's own weights"

    def places(self, content: Content) -> list[str]:
        return [""] if content.config.keys() >= _EMA_SETTINGS and content.source.infos else []

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        place, config = self.place(content), content.config
        step = self.started(content, as_number(config["optimization_step"]))
        late = int(as_number(config["update_after_step"]) or 0)
        n_averaged = None if step is None else max(step - late, 1)
        rule = ema_rule(as_number(config["decay"]))
        return self.found(content, content.under(place), step=step, n_averaged=n_averaged, rule=rule)
