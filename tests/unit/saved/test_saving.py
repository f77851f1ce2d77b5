"""Saving and loading on one process; several ranks and engines are in tests/multigpu."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from sharded_avg import EMA, SWA, CheckpointError, ConfigError, Schedule, ShardedAverage, SwapError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
RULES = {"ema": EMA(decay=0.9), "mean": SWA()}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    built = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7, bias=False), nn.Linear(7, 1))
    built[1].requires_grad_(False)
    return built


def stepped(average: ShardedAverage, net: nn.Module, num_steps: int) -> None:
    for _ in range(num_steps):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1)
        average.update()


def values(average: ShardedAverage) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for name in average.names:
        with average.summon_full_params(name) as full:
            found[name] = full
    return found


def assert_same(left: ShardedAverage, right: ShardedAverage) -> None:
    ours, theirs = values(left), values(right)
    assert all(torch.equal(ours[name][key], theirs[name][key]) for name in theirs for key in theirs[name])
    assert left.n_averaged == right.n_averaged


def test_round_trip_and_resume(tmp_path):
    """P92, P93: average, count and schedule position; the resumed run equals the uninterrupted one."""
    net = model()
    schedule = Schedule(start_step=2, every_steps=3)
    one = ShardedAverage(net, {"ema": EMA(decay=0.9, warmup=True)}, schedule=schedule)
    stepped(one, net, 7)
    one.save(tmp_path / "average")
    other_net = model()
    other_net.load_state_dict(net.state_dict())
    other = ShardedAverage(other_net, {"ema": EMA(decay=0.9, warmup=True)}, schedule=schedule)
    other.load(tmp_path / "average")
    assert_same(one, other)
    stepped(one, net, 5)
    stepped(other, other_net, 5)
    assert one.n_averaged == 4
    assert_same(one, other)


def test_folder_is_plain_and_readable(tmp_path):
    """The model's own names and full shapes, in a folder that DCP alone can read, with a manifest for people."""
    net = model()
    average = ShardedAverage(net, RULES)
    stepped(average, net, 2)
    average.save(tmp_path / "average")
    plain = {"ema.0.weight": torch.zeros(5, 3), "mean.2.bias": torch.zeros(1)}
    dcp.load(plain, checkpoint_id=tmp_path / "average")
    assert torch.equal(plain["ema.0.weight"], values(average)["ema"]["0.weight"])
    manifest = json.loads((tmp_path / "average" / "manifest.json").read_text())
    assert manifest["format"] == "sharded_avg"
    assert manifest["averages"]["ema"] == {
        "rule": {"kind": "EMA", "decay": 0.9, "warmup": False},
        "n_averaged": 2,
        "updates": [[1, 2, 1]],
        "snapshots": 0,
    }
    assert manifest["tensors"]["0.weight"] == {"shape": [5, 3], "dtype": "float32"}
    assert sorted(manifest["tensors"]) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_stateful_inside_the_users_own_checkpoint(tmp_path):
    net = model()
    average = ShardedAverage(net, RULES)
    stepped(average, net, 3)
    dcp.save({"model": net.state_dict(), "average": average}, checkpoint_id=tmp_path / "run")
    fresh = ShardedAverage(model(1), RULES)
    dcp.load({"average": fresh}, checkpoint_id=tmp_path / "run")
    ours, theirs = values(average), values(fresh)
    assert all(torch.equal(ours[n][key], theirs[n][key]) for n in RULES for key in ("0.weight", "0.bias", "2.weight"))
    assert fresh.n_averaged == 3


def test_saved_before_the_first_update(tmp_path):
    """P94: a delayed start survives; nothing untrained is on disk, and loading it is no error."""
    net = model()
    average = ShardedAverage(net, RULES, schedule=Schedule(start_step=5))
    stepped(average, net, 3)
    average.save(tmp_path / "average")
    dcp.save({"average": average}, checkpoint_id=tmp_path / "run")
    for load in (
        lambda fresh: fresh.load(tmp_path / "average"),
        lambda fresh: dcp.load({"average": fresh}, checkpoint_id=tmp_path / "run"),
    ):
        fresh = ShardedAverage(net, RULES, schedule=Schedule(start_step=5))
        load(fresh)
        assert fresh.n_averaged == 0
        assert fresh.nbytes == 0
        assert [fresh.update(), fresh.update()] == [False, True]


def test_saved_while_swapped(tmp_path):
    """P18: what is saved inside a swap is the average, and the swap goes on."""
    net = model()
    average = ShardedAverage(net, RULES)
    stepped(average, net, 3)
    expected = values(average)
    with average.swapped("ema"):
        average.save(tmp_path / "average")
        assert all(torch.equal(expected["ema"][key], value) for key, value in net.state_dict().items())
        inside = values(average)
        with pytest.raises(SwapError):
            average.load(tmp_path / "average")
    fresh = ShardedAverage(net, RULES)
    fresh.load(tmp_path / "average")
    for found in (values(fresh), inside):
        assert all(torch.equal(found[name][key], expected[name][key]) for name in RULES for key in expected[name])


def test_overwriting_replaces(tmp_path):
    net = model()
    average = ShardedAverage(net, RULES)
    for _ in range(2):
        stepped(average, net, 1)
        average.save(tmp_path / "average")
    fresh = ShardedAverage(net, RULES)
    fresh.load(tmp_path / "average")
    assert_same(fresh, average)
    assert [path.name for path in tmp_path.iterdir()] == ["average"]


@pytest.mark.parametrize(
    ("other", "rules", "message"),
    [
        (nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(7, 2)), RULES, r"2\.weight.*\[1, 7\].*\[2, 7\]"),
        (nn.Sequential(nn.Linear(3, 5)), RULES, r"the model's average lacks: \['2\.weight', '2\.bias'\]"),
        (
            nn.Sequential(*[nn.Linear(3, 5)] * 1, nn.ReLU(), nn.Linear(7, 1), nn.Linear(1, 1)),
            RULES,
            r"missing.*3\.weight",
        ),
        (model(), {"ema": EMA(decay=0.9)}, r"lacks: \['mean'\]"),
        (model(), {**RULES, "more": SWA()}, r"missing from it: \['more'\]"),
    ],
)
def test_what_does_not_fit_changes_nothing(tmp_path, other, rules, message):
    net = model()
    average = ShardedAverage(net, RULES)
    stepped(average, net, 3)
    average.save(tmp_path / "average")
    fresh = ShardedAverage(other, rules)
    fresh.update()
    before = values(fresh)
    with pytest.raises(CheckpointError, match=message):
        fresh.load(tmp_path / "average")
    after = values(fresh)
    assert all(torch.equal(before[name][key], after[name][key]) for name in rules for key in before[name])
    assert fresh.n_averaged == 1


def test_folder_without_an_average(tmp_path):
    with pytest.raises(CheckpointError, match="holds no saved average"):
        ShardedAverage(model(), RULES).load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "something else"}')
    with pytest.raises(CheckpointError, match="not the manifest"):
        ShardedAverage(model(), RULES).load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "sharded_avg", "version": 99}')
    with pytest.raises(CheckpointError, match="version 99"):
        ShardedAverage(model(), RULES).load(tmp_path)


def test_items_are_not_tensors(tmp_path):
    """What cannot be meant is refused with the way out."""
    net = model()
    average = ShardedAverage(net, RULES)
    stepped(average, net, 1)
    item = average.state_dict()["ema"]["0.weight"]
    assert item.shape == (5, 3)
    with pytest.raises(CheckpointError, match="summon_full_params"):
        item + 1
    with pytest.raises(CheckpointError, match="cannot be pickled"):
        pickle.dumps(item)
    with pytest.raises(CheckpointError, match="were not read"):
        average.load_state_dict({**average.state_dict(), "ema": {"0.weight": torch.zeros(5, 3)}})


def test_items_are_copied_as_torch_2_8_does() -> None:
    """Its dcp.async_save fills what `zeros_like` gave; what has no dimensions it would make a number."""
    net = model()
    net.register_parameter("gain", nn.Parameter(torch.tensor(2.0)))
    average = ShardedAverage(net, RULES)
    average.update()
    item, scalar = (average.state_dict()["ema"][name] for name in ("0.weight", "gain"))
    copied = torch.zeros_like(item, device="cpu")
    copied.copy_(item)
    before = item._local.clone()
    item._local.add_(1.0)  # training goes on
    assert torch.equal(copied._local, before)
    assert copied._patches == item._patches
    with pytest.raises(CheckpointError, match=r"call average\.async_save\(folder\)"):
        torch.tensor(0.0).copy_(scalar)


def test_a_refused_load_of_the_users_own_checkpoint_changes_nothing(tmp_path):
    """DCP has read everything before the fit can be judged: into memory of its own."""
    net = model()
    average = ShardedAverage(net, RULES)
    stepped(average, net, 3)
    dcp.save({"average": average}, checkpoint_id=tmp_path / "run")
    other = ShardedAverage(net, RULES, dtype=torch.bfloat16)
    stepped(other, net, 1)
    before = values(other)
    with pytest.raises(CheckpointError, match="rounded to bfloat16"):
        dcp.load({"average": other}, checkpoint_id=tmp_path / "run")
    after = values(other)
    assert all(torch.equal(before[name][key], after[name][key]) for name in RULES for key in before[name])
    assert other.n_averaged == 1


def test_a_load_inside_a_swap_changes_nothing(tmp_path):
    net = model()
    average = ShardedAverage(net, RULES)
    stepped(average, net, 2)
    dcp.save({"average": average}, checkpoint_id=tmp_path / "run")
    stepped(average, net, 1)
    before, raw = values(average), {key: value.clone() for key, value in net.state_dict().items()}
    with average.swapped("ema"), pytest.raises(SwapError):
        dcp.load({"average": average}, checkpoint_id=tmp_path / "run")
    after = values(average)
    assert all(torch.equal(before[name][key], after[name][key]) for name in RULES for key in before[name])
    assert all(torch.equal(raw[key], value) for key, value in net.state_dict().items())


def test_values_that_were_not_read(tmp_path):
    net = model()
    average = ShardedAverage(net, RULES)
    stepped(average, net, 1)
    state = average.state_dict()
    for bad in (state, {"manifest": state["manifest"]}):
        with pytest.raises(CheckpointError, match="were not read"):
            average.load_state_dict(bad)


def test_an_average_is_not_copied():
    """Two objects on one store would each count half of the updates."""
    average = ShardedAverage(model(), RULES)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ConfigError, match="cannot be copied or pickled"):
            copied(average)
