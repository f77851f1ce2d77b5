"""Averages of other tools: each sample is claimed by one importer, and what comes out is the average, not the raw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sharded_avg import CheckpointError, ConfigError
from sharded_avg.files.dcp_folder import DcpFolder
from sharded_avg.formats.importers import IMPORTERS, find_importer
from sharded_avg.formats.importers.opened import open_content
from tests.helpers.foreign import (
    AVERAGE,
    BUILDERS,
    NAMES,
    RAW,
    Sample,
    as_dcp,
    composer,
    composer_ema,
    flat,
    prefixed,
    pretrained,
)
from tests.unit.formats.checking import check

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


@pytest.mark.parametrize("name", BUILDERS)
def test_sample(name: str, tmp_path: Path) -> None:
    format, build = BUILDERS[name]
    sample = build(tmp_path)
    check(sample, format)
    check(sample, format, forced=format)


@pytest.mark.parametrize("name", BUILDERS)
def test_one_importer_claims_it(name: str, tmp_path: Path) -> None:
    format, build = BUILDERS[name]
    content = open_content(build(tmp_path).path)
    assert content is not None
    assert [importer.format for importer in IMPORTERS if importer.places(content)] == [format]


NOT_IN_SAFETENSORS = {"composer"}  # names and flags among its tensors say which of them are the average
NO_TORCH_FILE = {"diffusers", "ema_file", "dinov3", "torchtitan"}  # their samples are folders, or safetensors already
FLAT = [
    name
    for name, (format, _) in BUILDERS.items()
    if format not in NOT_IN_SAFETENSORS | NO_TORCH_FILE and name != "cosmos, DCP" and not name.startswith("F5-TTS")
]


def as_safetensors(path: Path, content: object) -> Path:
    """The same tensors under flat keys; every value in memory of its own, as the format wants it."""
    save_file({key: value.clone() for key, value in flat(content).items()}, path)
    return path


@pytest.mark.parametrize("name", FLAT)
def test_the_same_keys_in_safetensors(name: str, tmp_path: Path) -> None:
    """R11: every importer reads its keys from either kind of file."""
    format, build = BUILDERS[name]
    sample = build(tmp_path)
    content = torch.load(sample.path, weights_only=False)
    stem = sample.path.with_suffix("").name
    there = replace(sample, path=as_safetensors(tmp_path / f"{stem}.safetensors", content))
    check(there, format)
    check(there, format, forced=format)


IN_DCP = [name for name in BUILDERS if name.startswith(("cosmos, DCP", "dinov3", "torchtitan"))]


@pytest.mark.parametrize("name", IN_DCP)
def test_the_keys_of_dcp_folders_in_safetensors(name: str, tmp_path: Path) -> None:
    """R11, R16."""
    format, build = BUILDERS[name]
    sample = build(tmp_path)
    folder = DcpFolder(sample.path)
    content = {key: folder.read(key) for key in folder.infos}
    check(replace(sample, path=as_safetensors(tmp_path / "x.safetensors", content)), format)


@pytest.mark.parametrize("key", ["ema", "model_ema", "ema_model", "ema_state_dict"])
def test_an_entry_is_told_from_a_submodule(key: str, tmp_path: Path) -> None:
    """R11: `ema.*` alone could be a submodule; beside weights of the same names and shapes it is their average."""
    alone = as_safetensors(tmp_path / "model.safetensors", prefixed(f"{key}.", AVERAGE))
    assert (find_importer(alone) is None) == (key == "ema")
    for raw in (prefixed("model.", RAW), prefixed("model.module.", RAW), RAW):
        path = as_safetensors(tmp_path / "both.safetensors", {**raw, **prefixed(f"{key}.", AVERAGE)})
        check(Sample(path), "timm" if key == "model_ema" else "ema_entry")
    other = {"body.weight": torch.zeros(2), **prefixed("ema.", AVERAGE)}
    assert find_importer(as_safetensors(tmp_path / "other.safetensors", other)) is None
    check(Sample(tmp_path / "other.safetensors"), "ema_entry", forced="ema_entry")


def test_keys_say_more_than_the_name_of_a_file(tmp_path: Path) -> None:
    """R11: in x_ema.safetensors, too, `online_model` and counters are no part of the average."""
    content = {"initted": True, "step": 3, **prefixed("online_model.", RAW), **prefixed("ema_model.", AVERAGE)}
    check(Sample(as_safetensors(tmp_path / "x_ema.safetensors", content), facts={"step": 3}), "ema_pytorch")


@pytest.mark.parametrize("where", ["x.safetensors", "dcp"])
def test_the_average_of_torchtnt_among_other_state(where: str, tmp_path: Path) -> None:
    """R11: an AveragedModel in a DCP folder, or anywhere else where keys are flat."""
    content = {"module": RAW, "swa_model": {"n_averaged": torch.tensor(4), **prefixed("module.", AVERAGE)}}
    path = as_dcp(tmp_path, content) if where == "dcp" else as_safetensors(tmp_path / where, content)
    check(Sample(path, facts={"n_averaged": 4}), "averaged_model")


def test_torchtitan_had_two_keys(tmp_path: Path) -> None:
    """R16: the later key has buffers, too; a checkpoint with both does not say which is meant."""
    name = "torchtitan since August 2026: buffers among them"
    check(BUILDERS[name][1](tmp_path / "new"), "torchtitan")
    check(BUILDERS["torchtitan"][1](tmp_path / "old"), "torchtitan")
    both = [
        {f"{place}.state.{name}.ema_params": v for name, v in AVERAGE.items()} for place in ("ema", "ema_optimizer")
    ]
    with pytest.raises(CheckpointError, match="2 averages of torchtitan"):
        find_importer(as_dcp(tmp_path, {**both[0], **both[1]})).open()


def test_every_importer_has_a_sample() -> None:
    formats = [importer.format for importer in IMPORTERS]
    assert len(formats) == len(set(formats))
    assert set(formats) == {format for format, _ in BUILDERS.values()}
    documented = (Path(__file__).parents[3] / "docs" / "formats.md").read_text()
    assert not [format for format in formats if f"`{format}`" not in documented]


NOT_AVERAGES = {
    "state dict": RAW,
    "Lightning": {"state_dict": RAW, "callbacks": {"ModelCheckpoint": {}}, "optimizer_states": [{"state": {}}]},
    "Lightning, only weights of an average": {"state_dict": RAW, "pytorch-lightning_version": "2.6.0"},
    "NeMo's file of raw weights": {"state_dict": RAW, "optimizer_states": [{"state": {}, "param_groups": []}]},
    "a model with a submodule called ema": prefixed("ema.", RAW),
    "a model with a submodule called teacher": {"model": prefixed("teacher.", RAW)},
    "an entry that holds more than a state dict": {"model": RAW, "ema": {"decay": 0.9, **RAW}},
    "a student and its teacher, which is another model": {"student": RAW, "teacher": AVERAGE, "optimizer": {}},
    "a list": [1, 2],
}


RAW_IF_FLAT = [name for name in NOT_AVERAGES if name not in ("a list", "Lightning, only weights of an average")]


@pytest.mark.parametrize("name", RAW_IF_FLAT)
def test_raw_weights_in_safetensors_are_not_claimed(name: str, tmp_path: Path) -> None:
    """R11: reading more must not make averages of raw weights."""
    assert find_importer(as_safetensors(tmp_path / "model.safetensors", NOT_AVERAGES[name])) is None


@pytest.mark.parametrize("name", NOT_AVERAGES)
def test_raw_weights_are_not_claimed(name: str, tmp_path: Path) -> None:
    torch.save(NOT_AVERAGES[name], tmp_path / "file.pt")
    assert find_importer(tmp_path / "file.pt") is None


def test_names_of_folders_are_no_witness(tmp_path: Path) -> None:
    """A run called x_ema holds raw weights; ema.pt may be one rank's shard (defect 20); a model folder is a model."""
    run = pretrained(tmp_path / "run_ema", {}, RAW)
    assert find_importer(run) is None
    assert find_importer(run / "diffusion_pytorch_model.safetensors") is None
    torch.save(RAW, tmp_path / "ema.pt")
    assert find_importer(tmp_path / "ema.pt") is None
    with pytest.raises(CheckpointError, match=r"may be one rank's shard"):
        find_importer(tmp_path / "ema.pt", "ema_file").open()
    (tmp_path / "empty").mkdir()
    assert find_importer(tmp_path / "empty") is None


NOT_STARTED = {
    "averaged_model": {"n_averaged": torch.tensor(0), **prefixed("module.", RAW)},
    "lightning": {
        "state_dict": RAW,
        "current_model_state": RAW,
        "averaging_state": {"n_averaged": torch.tensor(0)},
    },
    "lightning_swa": {
        "state_dict": RAW,
        "callbacks": {"StochasticWeightAveraging": {"n_averaged": 0, "average_model_state": RAW}},
    },
    "ema_pytorch": {"initted": torch.tensor(False), "step": torch.tensor(0), **prefixed("ema_model.", RAW)},
    "mmengine": {"state_dict": RAW, "ema_state_dict": {"steps": torch.tensor(0), **prefixed("module.", RAW)}},
    "torch_ema": {"decay": 0.9, "num_updates": 0, "shadow_params": list(RAW.values()), "collected_params": None},
    "composer": composer(RAW, composer_ema(RAW, active=False, started=False)),
}


@pytest.mark.parametrize("format", NOT_STARTED)
def test_before_the_first_update_there_is_no_average(format: str, tmp_path: Path) -> None:
    """P03: what is in its place are the weights that training began with."""
    torch.save(NOT_STARTED[format], tmp_path / "file.pt")
    found = find_importer(tmp_path / "file.pt")
    assert found is not None
    assert found.format == format
    with pytest.raises(CheckpointError, match="no update has gone into its average"):
        found.open(NAMES)


def test_swa_callback_before_it_has_a_model(tmp_path: Path) -> None:
    callbacks = {"StochasticWeightAveraging": {"n_averaged": 1, "average_model_state": None}}
    torch.save({"state_dict": RAW, "callbacks": callbacks}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="holds no tensors where lightning_swa keeps the average"):
        find_importer(tmp_path / "file.pt").open()


def test_several_formats_in_one_file(tmp_path: Path) -> None:
    torch.save({"state_dict": RAW, "state_dict_ema": AVERAGE, "ema": AVERAGE}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"\['timm', 'ema_entry'\].*--from"):
        find_importer(tmp_path / "file.pt")
    check(Sample(tmp_path / "file.pt"), "timm", forced="timm")
    with pytest.raises(ConfigError, match="format='nonsense'"):
        find_importer(tmp_path / "file.pt", "nonsense")


@pytest.mark.parametrize("name", NOT_AVERAGES)
def test_a_forced_format_does_not_invent(name: str, tmp_path: Path) -> None:
    torch.save(NOT_AVERAGES[name], tmp_path / "file.pt")
    for importer in IMPORTERS:
        if "teacher" in name and importer.format in ("dino", "dinov3"):
            continue  # where somebody says that it is DINO's, the teacher is the average
        with pytest.raises(CheckpointError):
            find_importer(tmp_path / "file.pt", importer.format).open(NAMES)


def test_two_averaged_models(tmp_path: Path) -> None:
    one = {"n_averaged": torch.tensor(1), **prefixed("module.", RAW)}
    torch.save({"a": one, "b": one}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"2 averages of averaged_model .*\['a\.', 'b\.'\]"):
        find_importer(tmp_path / "file.pt", "averaged_model").open()


NONSENSE: list[object] = ["x", None, float("nan"), float("inf"), -3, torch.zeros(2), {}, torch.tensor(float("nan"))]


@pytest.mark.parametrize("value", NONSENSE, ids=str)
def test_nonsense_in_the_place_of_numbers(value: object, tmp_path: Path) -> None:
    """An average or a clear error, and no other exception."""
    ema = {"decay": value, "num_updates": value, "shadow_params": list(AVERAGE.values()), "collected_params": None}
    optimizer = {
        "opt": {},
        "ema": list(AVERAGE.values()),
        "current_step": value,
        "decay": value,
        "every_n_steps": value,
    }
    contents: list[dict[str, object]] = [
        {"n_averaged": value, **prefixed("module.", AVERAGE)},
        {
            "state_dict": AVERAGE,
            "current_model_state": RAW,
            "averaging_state": {"n_averaged": value},
            "global_step": value,
        },
        {"state_dict": AVERAGE, "optimizer_states": [optimizer]},
        {"initted": value, "step": value, **prefixed("ema_model.", AVERAGE)},
        ema,
        {"state_dict": AVERAGE, "ema_state_dict": {"steps": value, **prefixed("module.", RAW)}, "meta": value},
        {"ema": AVERAGE, "step": value},
    ]
    for number, content in enumerate(contents):
        torch.save(content, tmp_path / f"{number}.pt")
        try:
            source = find_importer(tmp_path / f"{number}.pt").open(NAMES)
        except CheckpointError:
            continue
        assert all(torch.equal(source.read(name), AVERAGE[name]) for name in AVERAGE)
        assert all(isinstance(source.facts.get(key, 0), int) for key in ("n_averaged", "step"))


def test_composer_that_does_not_say_which_is_active(tmp_path: Path) -> None:
    algorithms = composer_ema(AVERAGE, active=False)
    del algorithms[0][1]["ema_weights_active"]
    torch.save(composer(RAW, algorithms), tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="does not say which weights are the average"):
        find_importer(tmp_path / "file.pt").open()
