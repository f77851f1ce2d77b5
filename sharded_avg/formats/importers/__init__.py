"""Averages that other tools saved.

IMPORTERS      one importer for each format
find_importer  the one that a checkpoint belongs to, as a Found
Found          a checkpoint and its importer; `open()` gives the averaged tensors as a source
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from ...errors import CheckpointError, ConfigError
from ...files.source import AbstractSource
from .base import AbstractImporter, Content, Names
from .composer import ComposerImporter
from .entries import (
    DiffusersImporter,
    EmaFileImporter,
    EntryImporter,
    FairseqImporter,
    MMEngineImporter,
    PrefixImporter,
    TorchtitanImporter,
)
from .lightning_family import LightningImporter, LightningSwaImporter, LitEmaImporter, NemoImporter
from .opened import open_content
from .torch_family import AveragedModelImporter, EmaPytorchImporter, ShadowImporter

__all__ = ["IMPORTERS", "Content", "Found", "Names", "find_importer", "open_content"]

IMPORTERS: tuple[AbstractImporter, ...] = (
    AveragedModelImporter(),
    LightningImporter(),
    LightningSwaImporter(),
    NemoImporter(),
    LitEmaImporter(),
    EmaPytorchImporter(),
    ShadowImporter("torch_ema", "torch_ema: shadow_params", "num_updates"),
    ShadowImporter("diffusers_state", "state_dict() of the EMAModel of diffusers: shadow_params", "optimization_step"),
    DiffusersImporter(),
    EmaFileImporter(),
    ComposerImporter(),
    MMEngineImporter(),
    FairseqImporter(),
    EntryImporter(
        "timm",
        "timm: state_dict_ema, formerly model_ema",
        "state_dict_ema",
        "model_ema",
    ),
    EntryImporter("d2go", "d2go: ema_state", "ema_state"),
    EntryImporter("long_live", "Self-Forcing, LongLive: generator_ema", "generator_ema"),
    EntryImporter("infinity", "Infinity: gpt_ema_for_vis, gpt_ema_fsdp", "gpt_ema_for_vis", "gpt_ema_fsdp"),
    EntryImporter("basicsr", "BasicSR, Real-ESRGAN: params_ema", "params_ema"),
    EntryImporter("dino", "DINO's teacher: teacher, alone or beside dino_loss", "teacher", certain="dino_loss"),
    EntryImporter(
        "ema_entry",
        "a state dict under ema, ema_state_dict or ema_model",
        "ema",
        "ema_state_dict",
        "ema_model",
        as_module=("ema",),
    ),
    PrefixImporter("cosmos", "Cosmos: net_ema.*", "net_ema.", "model.net_ema."),
    PrefixImporter(
        "dinov3",
        "DINOv3's DCP folders: model.model_ema.*; on request model.teacher.*, teacher.*",
        "model.model_ema.",
        unsure=("model.teacher.", "teacher."),
    ),
    TorchtitanImporter(),
)


@dataclass(frozen=True)
class Found:
    """A checkpoint, and the importer that it belongs to."""

    importer: AbstractImporter
    content: Content

    @property
    def format(self) -> str:
        """The importer's name, as `--from` takes it."""
        return self.importer.format

    @property
    def names(self) -> list[str]:
        """Of the averages, the one that `open` gives first, where the file has several of them by name."""
        return list(self.importer.named(self.content))

    def open_named(self, name: str) -> AbstractSource:
        """The one of these names."""
        return self.importer.average_of(self.content, name)

    def open(self, names: Names | None = None) -> AbstractSource:
        """The averaged tensors under the model's own names.

        `names`: the model's parameter names in order, for a format that numbers its tensors; a mapping gives shapes
        too, which are then checked. Raises `CheckpointError` if the file holds no average yet, or needs names.
        """
        return self.importer.average(self.content, names)


def find_importer(
    path: str | os.PathLike[str], format: str | None = None, *, ignore_classes: bool = False
) -> Found | None:
    """The importer of the checkpoint at `path`, or `None` if it is in no format that is known.

    `format` forces one. `ignore_classes` leaves out objects that are neither tensors nor plain values, such as a
    trainer's arguments; without it, a file with such objects is refused. Nothing in the file is run either way.
    Raises `CheckpointError` if the file cannot be opened, or holds averages of several formats.
    """
    known = {importer.format: importer for importer in IMPORTERS}
    if format is not None and format not in known:
        raise ConfigError(f"format={format!r} is not known; it can be {', '.join(known)}")
    content = open_content(path, ignore_classes=ignore_classes)
    if content is None:
        return None
    if format is not None:
        importer = known[format]
        if not importer.possible_places(content):
            raise content.refuse(f"this is not {format} ({importer.about}): it has no such entries")
        return Found(importer, content)
    claims = [importer for importer in IMPORTERS if importer.places(content)]
    claims = [importer for importer in claims if importer.by_keys] or claims
    if len(claims) > 1:
        raise CheckpointError(
            f"{str(path)!r} holds averages of several formats, {[importer.format for importer in claims]}: say which "
            "one is meant with --from (or format=)"
        )
    return Found(claims[0], content) if claims else None
