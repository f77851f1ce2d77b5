"""Averages that lie in a place of their own: below one key, below one prefix, or in one file.

EntryImporter     one top-level key of a torch file holds a whole state dict
PrefixImporter    tensors of any kind of checkpoint whose names begin with a prefix
MMEngineImporter  `state_dict` is the average, `ema_state_dict` is raw: exchanged on purpose
FairseqImporter   extra_state["ema"], with the fp32 values where there are any
EmaFileImporter   a safetensors file, or a folder of one, that is called an average
DiffusersImporter a pretrained folder whose config.json has the settings of an EMA
"""

from __future__ import annotations

import re

from ...files.safetensors_file import SafetensorsFiles
from ...files.source import AbstractSource
from .base import AbstractImporter, Content, Names, as_number, ema_rule, is_state

_DESCRIBES_ITSELF = {"n_averaged", "initted", "steps", "shadow_params", "num_updates"}


class EntryImporter(AbstractImporter):
    """A plain state dict under one of `keys`, the first that there is.

    With `certain`, the key alone could mean something else: then there must be that other key too, or no other at all.
    """

    def __init__(self, format: str, about: str, *keys: str, certain: str | None = None) -> None:
        self.format, self.about, self._keys, self._certain = format, about, keys, certain

    def claims(self, content: Content) -> bool:
        alone = self._certain is not None and isinstance(content.tree, dict) and len(content.tree) == 1
        is_certain = self._certain is None or alone or content.at(self._certain) is not None
        return self.accepts(content) and is_certain

    def accepts(self, content: Content) -> bool:
        return self._key(content) is not None

    def _key(self, content: Content) -> tuple[str, ...] | None:
        for key in self._keys:
            for keys in ((key,), (key, "module")):
                node = content.at(*keys)
                if is_state(node) and not _DESCRIBES_ITSELF & node.keys():
                    return keys
        return None

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        keys = self._key(content)
        if keys is None:
            raise content.refuse(f"it holds no state dict where {self.format} keeps the average ({self.about})")
        flats = content.under(".".join(keys) + ".")
        if all(name.startswith("module.") for name in flats):  # saved through DistributedDataParallel
            flats = {name.removeprefix("module."): flat for name, flat in flats.items()}
        return self.found(content, flats, step=content.number("step"))


class PrefixImporter(AbstractImporter):
    """Names that begin with one of `prefixes`, the first that any name has.

    `unsure`: more prefixes, which could mean something else and count only where somebody says what the format is.
    """

    def __init__(self, format: str, about: str, *prefixes: str, unsure: tuple[str, ...] = ()) -> None:
        self.format, self.about, self._prefixes, self._unsure = format, about, prefixes, unsure

    def claims(self, content: Content) -> bool:
        return bool(content.under(*self._prefixes))

    def accepts(self, content: Content) -> bool:
        return bool(content.under(*self._prefixes, *self._unsure))

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        prefixes = (*self._prefixes, *self._unsure)
        flats = next((found for prefix in prefixes if (found := content.under(prefix))), {})
        return self.found(content, flats, step=content.number("iteration"))


class TorchtitanImporter(AbstractImporter):
    """An optimizer whose state for each parameter holds its average."""

    format = "torchtitan"
    about = "torchtitan's EMA optimizer: ema_optimizer.state.*.ema_params"

    def claims(self, content: Content) -> bool:
        return bool(self._flats(content))

    @staticmethod
    def _flats(content: Content) -> dict[str, str]:
        inside = content.under("ema_optimizer.state.").items()
        return {rest.removesuffix(".ema_params"): flat for rest, flat in inside if rest.endswith(".ema_params")}

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        return self.found(content, self._flats(content))


class MMEngineImporter(AbstractImporter):
    """The hook exchanges the two before it saves: `ema_state_dict` = {`module.<name>`: raw, `steps`}."""

    format = "mmengine"
    about = "MMEngine's EMAHook: state_dict"

    def claims(self, content: Content) -> bool:
        other = content.at("ema_state_dict")
        return isinstance(other, dict) and "steps" in other and is_state(content.at("state_dict"))

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        n_averaged = self.started(content, content.number("ema_state_dict", "steps"))
        return self.found(
            content, content.under("state_dict."), n_averaged=n_averaged, step=content.number("meta", "iter")
        )


class FairseqImporter(AbstractImporter):
    """`extra_state["ema"]`, in the model's dtype, and `extra_state["ema_fp32_params"]` where it was kept in fp32."""

    format = "fairseq"
    about = "fairseq: extra_state['ema'], extra_state['ema_fp32_params']"

    def claims(self, content: Content) -> bool:
        return is_state(content.at("extra_state", "ema"))

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        flats = {**content.under("extra_state.ema."), **content.under("extra_state.ema_fp32_params.")}
        return self.found(content, flats)


class EmaFileImporter(AbstractImporter):
    """Weights in a file called an average, `ema.safetensors` or `x_ema.safetensors`, or in a folder `x_ema` beside `x`.

    A folder's name alone is no witness: a run called `x_ema` may hold raw weights. Only safetensors: an `ema.pt` of
    some trainers is one rank's shard, which looks like a whole average.
    """

    format = "ema_file"
    about = "Open-Sora, BAGEL, FastVideo, Open-Sora-Plan and others: ema.safetensors, *_ema.safetensors, *_ema/"

    def accepts(self, content: Content) -> bool:
        return True  # `average` says why not

    def claims(self, content: Content) -> bool:
        if not isinstance(content.source, SafetensorsFiles) or _has_ema_settings(content):
            return False
        if not content.path.is_dir():
            return re.fullmatch(r"(.+_)?ema(_model)?(_\d+)?", content.path.name.partition(".")[0]) is not None
        folder = content.path.resolve()
        return folder.name.endswith("_ema") and folder.with_name(folder.name.removesuffix("_ema")).is_dir()

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        if not isinstance(content.source, SafetensorsFiles):
            raise content.refuse(
                "only a .safetensors file is read as a whole average: a .pt file may be one rank's shard"
            )
        return self.found(content, {name: name for name in content.source.infos})


class DiffusersImporter(AbstractImporter):
    """What EMAModel.save_pretrained writes: the averaged model, and the settings of the EMA in its config.json."""

    format = "diffusers"
    about = "diffusers' EMAModel.save_pretrained: the folder's own weights"

    def claims(self, content: Content) -> bool:
        return _has_ema_settings(content) and bool(content.source.infos)

    def average(self, content: Content, names: Names | None = None) -> AbstractSource:
        config = content.config
        step = self.started(content, as_number(config["optimization_step"]))
        late = int(as_number(config["update_after_step"]) or 0)
        n_averaged = None if step is None else max(step - late, 1)
        rule = ema_rule(as_number(config["decay"]))
        return self.found(content, {n: n for n in content.source.infos}, step=step, n_averaged=n_averaged, rule=rule)


def _has_ema_settings(content: Content) -> bool:
    return {"decay", "optimization_step", "update_after_step"} <= content.config.keys()
