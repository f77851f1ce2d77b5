"""Folders that are whole or not there, on a disk and under URLs; asynchronous saves; loads that change nothing."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import fsspec
import pytest
import torch
from torch import nn

from sharded_avg import EMA, SWA, CheckpointError, ConfigError, ShardedAverage, load_averaged_state_dict
from sharded_avg.averages.history import History
from sharded_avg.saved.folder import saving
from sharded_avg.saved.folder.place import Disk, Remote, place_of

# DCP says so from its background thread when there is no process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

RULES = {"ema": EMA(decay=0.5), "mean": SWA()}


def model(value: float = 0.0) -> nn.Module:
    built = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(value)
    return built


def average_of(*values: float, **arguments) -> ShardedAverage:
    """An average of weights that were all `values[0]`, then all `values[1]`, ..."""
    net = model()
    average = ShardedAverage(net, RULES, **arguments)
    for value in values:
        step(average, net, value)
    average.net = net
    return average


def step(average: ShardedAverage, net: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    average.update()


def value_of(average: ShardedAverage, name: str = "mean") -> float:
    with average.summon_full_params(name) as full:
        [value] = {float(value) for tensor in full.values() for value in tensor.flatten()}
    return value


@pytest.fixture(params=["disk", "remote"])
def path(request, tmp_path) -> str:
    if request.param == "disk":
        return str(tmp_path / "run" / "average")
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    return "memory://run/average"


def test_save_and_overwrite(path):
    for last in (1.0, 3.0):
        average_of(1.0, last).save(path)
        fresh = average_of()
        assert str(fresh.load(path)) == "all of it was loaded"
        assert value_of(fresh) == (1.0 + last) / 2
    place = place_of(path)
    assert not place.exists(place.incoming)
    assert not place.exists(place.path + ".outgoing")


def test_a_foreign_folder_is_not_replaced(path):
    place = place_of(path)
    place.make(path)
    place.write(f"{path}/thesis.txt", "years of work")
    with pytest.raises(CheckpointError, match="is no saved average"):
        average_of(1.0).save(path)
    assert place.read(f"{path}/thesis.txt") == "years of work"


@pytest.mark.parametrize("left_as", [".incoming", ".outgoing"])
def test_a_save_killed_while_it_published(path, left_as):
    """The only whole folder is under another name: it is found, and the next save clears up."""
    place = place_of(path)
    average_of(1.0).save(path)
    place.move(path, path + left_as)
    fresh = average_of()
    fresh.load(path)
    assert value_of(fresh) == 1.0
    average_of(3.0).save(path)
    fresh.load(path)
    assert value_of(fresh) == 3.0
    assert not place.exists(path + left_as)


def test_a_first_save_cut_short_is_refused(path):
    place = place_of(path)
    average_of(1.0).save(path)
    place.move(path, place.incoming)
    (Path(f"{place.incoming}/manifest.json").unlink if isinstance(place, Disk) else lambda: None)()
    if isinstance(place, Remote):
        fsspec.filesystem("memory").rm(f"{place.incoming}/manifest.json")
    with pytest.raises(CheckpointError, match="cut short"):
        average_of().load(path)


def test_nothing_there(path):
    with pytest.raises(CheckpointError, match="nothing of that name"):
        average_of().load(path)


def test_unknown_protocol():
    with pytest.raises(CheckpointError, match="fsspec"):
        average_of(1.0).save("nosuchprotocol://bucket/average")


def test_manifest_of_another_save_is_torn(tmp_path):
    average_of(1.0).save(tmp_path / "one")
    average_of(1.0, 5.0).save(tmp_path / "two")
    shutil.copy(tmp_path / "two" / "manifest.json", tmp_path / "one" / "manifest.json")
    fresh = average_of(7.0)
    with pytest.raises(CheckpointError, match="torn"):
        fresh.load(tmp_path / "one")
    assert (value_of(fresh), fresh.n_averaged) == (7.0, 1)


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_damaged_values_change_nothing(tmp_path, damage):
    """A file that cannot be read to its end leaves the average that was there, also in part."""
    average_of(1.0).save(tmp_path / "average")
    [file] = (tmp_path / "average").glob("*.distcp")
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(data[: len(data) * 2 // 3])
    else:
        at = data.rindex(torch.ones(7).numpy().tobytes())
        data[at] ^= 0xFF
        file.write_bytes(data)
    fresh = average_of(7.0)
    with pytest.raises(CheckpointError, match="average"):
        fresh.load(tmp_path / "average")
    assert (value_of(fresh), value_of(fresh, "ema"), fresh.n_averaged) == (7.0, 7.0, 1)
    step(fresh, fresh.net, 9.0)
    assert value_of(fresh) == 8.0


def test_loading_over_a_started_average_replaces_it(tmp_path):
    average_of(1.0, 3.0).save(tmp_path / "average")
    other = average_of(50.0, 60.0, 70.0)
    other.load(tmp_path / "average")
    assert (value_of(other), other.n_averaged) == (2.0, 2)
    step(other, other.net, 5.0)
    assert value_of(other) == 3.0


class TestNotStrict:
    def test_loads_what_fits_and_says_what_not(self, tmp_path):
        average_of(1.0, 3.0).save(tmp_path / "average")
        net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(2, 2))
        average = ShardedAverage(net, {"mean": SWA(), "more": SWA()})
        average.update()
        with average.summon_full_params("more") as more:
            pass
        with pytest.raises(CheckpointError, match="Nothing was changed"):
            average.load(tmp_path / "average")
        result = average.load(tmp_path / "average", strict=False)
        assert result.missing_averages == ["more"]
        assert result.unexpected_averages == ["ema"]
        assert result.missing_keys == ["2.weight", "2.bias"]
        assert set(result.misfits) == {"1.weight", "1.bias"}
        assert "2.weight" in str(result)
        with average.summon_full_params("mean") as full:
            assert torch.equal(full["0.weight"], torch.full((5, 3), 2.0))
            assert torch.equal(full["1.weight"], net[1].weight)
        with average.summon_full_params("more") as still:
            assert all(torch.equal(still[key], more[key]) for key in more)

    def test_a_narrower_dtype_is_a_misfit(self, tmp_path):
        """Defect 23: an fp32 average is not rounded because it is loaded into a bf16 one."""
        average_of(1.0).save(tmp_path / "average")
        narrow = average_of(dtype=torch.bfloat16)
        with pytest.raises(CheckpointError, match=r"rounded to bfloat16.*torch\.float32"):
            narrow.load(tmp_path / "average")
        assert len(narrow.load(tmp_path / "average", strict=False).misfits) == 4

    def test_a_wider_dtype_fits(self, tmp_path):
        average_of(1.5, dtype=torch.bfloat16).save(tmp_path / "average")
        wide = average_of()
        wide.load(tmp_path / "average")
        assert value_of(wide) == 1.5


class TestAsyncSave:
    def test_what_lands_is_the_state_of_the_call(self, path, monkeypatch):
        """P23: updates and swaps while the bytes travel do not reach the file."""
        average = average_of(1.0, 3.0)
        gate = threading.Event()
        write = saving.write_pieces
        monkeypatch.setattr(saving, "write_pieces", lambda *a: (gate.wait(30), write(*a))[1])
        pending = average.async_save(path)
        assert not pending.done()
        step(average, average.net, 100.0)
        with average.swapped("mean"):
            gate.set()
            pending.result()
        fresh = average_of()
        fresh.load(path)
        assert (value_of(fresh), value_of(fresh, "ema"), fresh.n_averaged) == (2.0, 2.0, 2)
        assert average.n_averaged == 3
        pending.result()  # once more does nothing

    def test_called_while_swapped(self, path):
        average = average_of(1.0, 3.0)
        with average.swapped("ema"):
            pending = average.async_save(path)
        step(average, average.net, 100.0)
        pending.result()
        fresh = average_of()
        fresh.load(path)
        assert value_of(fresh, "ema") == 2.0

    def test_the_folder_has_its_name_only_at_the_end(self, tmp_path):
        pending = average_of(1.0).async_save(tmp_path / "average")
        assert not (tmp_path / "average").exists()
        pending.result()
        assert json.loads((tmp_path / "average" / "manifest.json").read_text())["step"] == 1

    def test_failure_is_reported(self, tmp_path, monkeypatch):
        def full(*_: object) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(saving, "write_pieces", full)
        pending = average_of(1.0).async_save(tmp_path / "average")
        with pytest.raises(CheckpointError, match="No space left"):
            pending.result()
        assert not (tmp_path / "average").exists()


def test_saving_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="failed"):
        average_of(1.0).save(tmp_path / "file" / "average")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX file names")
def test_path_objects_and_strings(tmp_path):
    average_of(1.0).save(str(tmp_path / "a"))
    average_of().load(tmp_path / "a")
    for bad in (None, 3, "", "a\0b"):
        with pytest.raises(ConfigError, match="path="):
            average_of(1.0).save(bad)


def test_damage_is_noticed_through_urls(tmp_path):
    average_of(1.0).save(tmp_path / "average")
    [file] = (tmp_path / "average").glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[data.rindex(torch.ones(7).numpy().tobytes())] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        average_of().load(f"file://{tmp_path}/average")


def test_saves_in_a_row_wait_for_each_other(path):
    average = average_of(1.0)
    average.async_save(path)
    step(average, average.net, 3.0)
    average.async_save(path)
    step(average, average.net, 5.0)
    average.save(path)
    fresh = average_of()
    fresh.load(path)
    assert (value_of(fresh), fresh.n_averaged) == (3.0, 3)


def test_updates_whose_steps_nobody_recorded():
    """A converted or merged average says how many updates went in, but not which."""
    history = History.from_lists([], 7).after(20).after(30).after(40)
    assert (history.n_averaged, history.as_lists()) == (10, [[20, 40, 10]])


def test_history_of_an_irregular_schedule_is_bounded():
    history = History()
    for step_ in range(3000):
        if step_ % 3:
            history = history.after(step_)
    assert history.n_averaged == 2000
    assert len(history.as_lists()) <= 256
    with pytest.raises(ValueError, match="3 steps are listed for 2"):
        History.from_lists([[1, 3, 1]], 2)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_with_buffers_the_plain_model_can_load_it(tmp_path, buffers):
    """Strictly, also where some are shared, have no dimension, or are of integers."""
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    net[2].register_buffer("running_mean", net[1].running_mean)
    average = ShardedAverage(net, EMA(decay=0.5), buffers=buffers)
    for _ in range(3):
        net(torch.randn(5, 3))
        average.update()
    net(torch.randn(5, 3))
    average.save(tmp_path / "run", with_buffers=True)
    found = load_averaged_state_dict(tmp_path / "run")
    with average.summon_full_params() as full:
        assert found.keys() == full.keys() == net.state_dict().keys()
        assert all(torch.equal(found[name], value) for name, value in full.items())
    assert int(found["1.num_batches_tracked"]) == 4
    average.load(tmp_path / "run")  # which has no use for them, and says nothing
    average.save(tmp_path / "run")
    assert "1.num_batches_tracked" not in load_averaged_state_dict(tmp_path / "run")
