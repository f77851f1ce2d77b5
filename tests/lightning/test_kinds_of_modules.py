"""Modules that averaging found hard: made late, frozen, tied, compiled, lazy, or impossible to copy."""

from __future__ import annotations

import gc
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from sharded_avg.exchange.fingerprint import Fingerprint
from sharded_avg.lightning import EMAWeightAveraging

from .modules import NUM_BATCHES, Tiny, batches, loader, make_optimizer
from .reference import DECAY, NUM_STEPS, assert_same, plain_average, plain_loss, plain_training, with_weights
from .runs import Recorder, full_weights, module, run, trainer
from .strategies import among
from .watching import At, counts, full_average

# --- made in configure_model -----------------------------------------------------------------------------------------


class Counting(Tiny):
    """Counts how often its layers are made."""

    def __init__(self, **options: Any) -> None:
        super().__init__(late=True, **options)
        self.times = 0

    def configure_model(self) -> None:
        self.times += 1
        super().configure_model()


def tensor_bytes() -> int:
    """Of all tensors that this process has; views of one storage are counted once."""
    Fingerprint(torch.zeros(1))  # whose factors are made once in a process, by the first swap
    gc.unfreeze()  # what earlier tests have left counts, too
    gc.collect()
    things = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))  # isinstance asks the thing
    found = [tensor for tensor in things if not tensor.is_meta]
    plain = [getattr(tensor, "_local_tensor", tensor) for tensor in found]
    return sum(
        {
            s.data_ptr(): s.nbytes()
            for s in (tensor.untyped_storage() for tensor in plain if type(tensor).__name__ != "FakeTensor")
        }.values()
    )


# DeepSpeed keeps small parameters gathered, now and then: not here, where bytes are counted.
KEEPING_NOTHING = {"deepspeed_3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}}


def growth(tmp_path: Path, name: str, callbacks: list[Any]) -> tuple[int, int]:
    """How many bytes came to be held in the course of a fit, and how often layers were made."""
    held: list[int] = []
    looks = [At(moment, lambda t: held.append(tensor_bytes())) for moment in ("on_train_start", "on_train_epoch_end")]
    model = module(name, Counting)
    trainer(tmp_path, name, [*callbacks, *looks], options=KEEPING_NOTHING.get(name)).fit(model)
    return held[-1] - held[0], model.times


def fit_late(tmp_path: Path, name: str) -> dict[str, Any]:
    """Two fits, without and with an average, and how much the second one holds in addition."""
    callback = EMAWeightAveraging(decay=DECAY, use_buffers=False)
    plain, _ = growth(tmp_path, name, [])
    averaging, times = growth(tmp_path, name, [callback])
    return {
        "times": times,
        "more": averaging - plain,
        "nbytes": callback.average.nbytes,
        "average": full_average(callback),
        "counts": counts(callback),
    }


@among("single", "fsdp2", "deepspeed_3", further=["ddp", "fsdp_sharded", "fsdp_by_hand"])
def test_layers_made_late(name: str, tmp_path: Path) -> None:
    """P01, P02, P34, P72, L15, L17: no warning, one `configure_model`, and a rank's memory grows by its own pieces."""
    _, weights = plain_training(NUM_STEPS)
    expected = plain_average(weights) | {name: weights[NUM_STEPS][name] for name in ("shift", "calls")}
    ranks = run(name, fit_late, tmp_path, name=name)
    for seen in ranks:
        assert seen["times"] == 1
        assert_same(seen["average"], expected)
        assert seen["counts"] == (NUM_STEPS, NUM_STEPS)
        assert seen["more"] == seen["nbytes"]
    assert sum(seen["nbytes"] for seen in ranks) == 4 * sum(param.numel() for param in Tiny().parameters())
    assert len(ranks) == 1 or max(seen["nbytes"] for seen in ranks) < 400  # of 648


class Linears(lightning.LightningModule):
    """What can be made on the meta device: its layers initialise themselves, each rank its own piece."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 7), nn.Linear(7, 3)
        self.devices = {param.device.type for param in self.parameters()}

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard_linears(self, self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.second(torch.tanh(self.first(batch[0]))) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return make_optimizer("sgd", list(self.parameters()))

    def train_dataloader(self) -> Any:
        return loader(batches(NUM_BATCHES))


def shard_linears(model: Linears, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for part in (model.first, model.second, model):
        fully_shard(part, mesh=mesh)


def fit_empty(tmp_path: Path, name: str) -> dict[str, Any]:
    callback, recorder = EMAWeightAveraging(decay=DECAY), Recorder()
    options = {"auto_wrap_policy": {nn.Linear}} if name == "fsdp_sharded" else None
    fitted = trainer(tmp_path, name, [callback, recorder], options=options)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`trainer.init_module` cannot fully support"
        )  # of FSDPStrategy; it does, here
        warnings.filterwarnings("ignore", "DTensor random operators may not have complete support on cpu")
        with fitted.init_module(empty_init=True):
            model = Linears()
        fitted.fit(model)
    return {
        "devices": model.devices,
        "weights": recorder.weights,
        "average": full_average(callback),
        "end": full_weights(fitted),
        "nbytes": callback.average.nbytes,
    }


@among("fsdp_sharded", "fsdp2")
def test_layers_made_empty(name: str, tmp_path: Path) -> None:
    """P02: `init_module(empty_init=True)` makes them on the meta device; their average is that of the real weights."""
    ranks = run(name, fit_empty, tmp_path, name=name)
    for seen in ranks:
        assert seen["devices"] == {"meta"}
        assert sorted(seen["weights"]) == list(range(1, NUM_STEPS + 1))
        assert_same(seen["average"], plain_average(seen["weights"]))
        assert_same(seen["end"], seen["average"])
    assert sum(seen["nbytes"] for seen in ranks) == 4 * (3 * 7 + 7 + 7 * 3 + 3)


# --- frozen ---------------------------------------------------------------------------------------------------------

FROZEN = ("block.down.weight", "block.down.bias")


def fit_frozen(tmp_path: Path, name: str) -> dict[str, Any]:
    callback = EMAWeightAveraging(decay=DECAY, use_buffers=False)
    fitted = trainer(tmp_path, name, [callback])
    fitted.fit(module(name, frozen=True))
    tensors = set(callback.average.manifest().tensors)
    return {"tensors": tensors, "nbytes": callback.average.nbytes, "average": full_average(callback)}


@among("single", "ddp", "fsdp2", "deepspeed_2")
def test_frozen_weights_cost_nothing(name: str, tmp_path: Path) -> None:
    """P79, P103: they are neither kept nor averaged, and stand in full states as they are."""
    _, weights = plain_training(NUM_STEPS, frozen=True)
    params = {key: param.numel() for key, param in Tiny().named_parameters() if key not in FROZEN}
    expected = {key: value if key in params else weights[1][key] for key, value in plain_average(weights).items()}
    expected |= {key: weights[NUM_STEPS][key] for key in ("shift", "calls")}
    ranks = run(name, fit_frozen, tmp_path, name=name)
    assert sum(seen["nbytes"] for seen in ranks) == 4 * sum(params.values())
    for seen in ranks:
        assert seen["tensors"] == params.keys()
        assert_same(seen["average"], expected)


class Unfreezing(lightning.callbacks.BaseFinetuning):
    """Trains the block from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.block)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.block, optimizer, lr=0.05)


def fit_unfreezing(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    """Three epochs in one run, and from the checkpoints before and after the unfreezing."""
    paths = [None, *(tmp_path / f"{epoch}.ckpt" for epoch in range(3))]
    saver, runs = At("on_train_epoch_end", lambda t: t.save_checkpoint(paths[t.current_epoch + 1])), []
    for path in paths[:3]:
        callback, recorder = EMAWeightAveraging(decay=DECAY), Recorder()
        others = [] if path else [saver]
        fitted = trainer(tmp_path, name, [callback, Unfreezing(), recorder, *others], max_epochs=3)
        fitted.fit(module(name), ckpt_path=path)
        runs.append({"average": full_average(callback), "weights": recorder.weights, "counts": counts(callback)})
    return runs


@among("single", "ddp")
def test_unfrozen_in_the_middle(name: str, tmp_path: Path) -> None:
    """P103: they join as they are at their first step, also in runs resumed before and after that."""
    for straight, *resumed in run(name, fit_unfreezing, tmp_path, name=name):
        first = straight["weights"][1]["block.up.weight"]
        assert torch.equal(first, straight["weights"][NUM_BATCHES]["block.up.weight"])
        assert not torch.equal(first, straight["weights"][NUM_BATCHES + 1]["block.up.weight"])
        assert [min(seen["weights"]) for seen in resumed] == [NUM_BATCHES + 1, 2 * NUM_BATCHES + 1]
        for seen in (straight, *resumed):
            weights = straight["weights"] | seen["weights"]  # resumed, Lightning's freezes again
            late = plain_average({step: value for step, value in weights.items() if step > NUM_BATCHES})
            whole = plain_average(weights)
            assert_same(seen["average"], {key: late[key] if "block" in key else whole[key] for key in whole})
            assert seen["counts"] == (3 * NUM_BATCHES, 3 * NUM_BATCHES)


# --- tied, lazy, and others ------------------------------------------------------------------------------------------


def fit_tied(tmp_path: Path, name: str) -> dict[str, Any]:
    callback, path = EMAWeightAveraging(decay=DECAY, use_buffers=False), tmp_path / "tied.ckpt"
    fitted, model = trainer(tmp_path, name, [callback]), module(name, tied=True)
    fitted.fit(model)
    fitted.save_checkpoint(path)
    return {
        "nbytes": callback.average.nbytes,
        "average": full_average(callback),
        "end": full_weights(fitted),
        "val_loss": float(fitted.callback_metrics["val_loss"]),
        "is_tied": model.block.up.weight is model.block.again.weight,
        "saved": None if path.is_dir() else torch.load(path, weights_only=True)["state_dict"],
    }


@among("single", "ddp", "fsdp_sharded", "fsdp2", "deepspeed_2")
def test_tied_weights(name: str, tmp_path: Path) -> None:
    """P105, L18: kept and exchanged once, under both names in full states, and tied at the end."""
    _, weights = plain_training(NUM_STEPS, tied=True)
    expected = plain_average(weights) | {key: weights[NUM_STEPS][key] for key in ("shift", "calls")}
    ranks = run(name, fit_tied, tmp_path, name=name)
    assert sum(seen["nbytes"] for seen in ranks) == 4 * sum(param.numel() for param in Tiny(tied=True).parameters())
    for seen in ranks:
        assert_same(seen["average"], expected)
        assert_same(seen["end"], expected)
        assert seen["is_tied"]
        assert seen["val_loss"] == pytest.approx(plain_loss(with_weights(expected), first=100), rel=1e-6)
        if seen["saved"] is not None:
            model = Tiny(tied=True)
            model.load_state_dict(seen["saved"])
            assert_same(dict(model.state_dict()), expected)


class Lazy(Tiny):
    """Its first layer is sized by the first batch; then its values are set, to be those of Tiny."""

    def _make_layers(self) -> None:
        super()._make_layers()
        first = {name: value.clone() for name, value in self.wide.state_dict().items()}
        self.wide = nn.LazyLinear(5)
        self.wide.register_forward_hook(lambda layer, *_: self._set(layer, first))

    def _set(self, layer: Any, first: dict[str, Tensor]) -> None:
        if first:
            layer.load_state_dict(first)
            first.clear()


@pytest.mark.parametrize("num_sanity_val_steps", [0, 2])
def test_lazy_layers(num_sanity_val_steps: int, tmp_path: Path) -> None:
    """P45, L15: the average is built once they have a size, by the first batch of training or of the sanity check."""
    callback, recorder = EMAWeightAveraging(decay=DECAY), Recorder()
    fitted = trainer(tmp_path, "single", [callback, recorder], num_sanity_val_steps=num_sanity_val_steps)
    fitted.fit(model := module("single", Lazy))
    assert counts(callback) == (NUM_STEPS, NUM_STEPS)
    assert_same(full_average(callback), plain_average(recorder.weights))
    assert_same(dict(model.state_dict()), plain_average(recorder.weights))


class Uncopyable(Tiny):
    """Refuses to be copied or pickled, as modules with locks and loaders do; one layer has torch's old weight_norm."""

    def _make_layers(self) -> None:
        super()._make_layers()
        self.lock = threading.Lock()
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(self.head)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("the module was copied")

    __copy__ = __deepcopy__

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("the module was pickled")


def test_modules_that_cannot_be_copied(tmp_path: Path) -> None:
    """P30, L15: nothing but their tensors is; the weight that weight_norm computes follows what it is computed from."""
    callback, recorder, path = EMAWeightAveraging(decay=DECAY), Recorder(), tmp_path / "last.ckpt"
    fitted, model = trainer(tmp_path, "single", [callback, recorder]), module("single", Uncopyable)
    fitted.fit(model)
    fitted.save_checkpoint(path)
    expected = plain_average(recorder.weights)
    assert {"head.weight_g", "head.weight_v"} < expected.keys()
    assert_same(dict(model.state_dict()), expected)
    (metrics,) = fitted.validate(model, verbose=False)
    again = Uncopyable()
    again.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert metrics["val_loss"] == fitted.callback_metrics["val_loss"] == pytest.approx(plain_loss(again, 100), rel=1e-6)


# --- compiled -------------------------------------------------------------------------------------------------------


class PartlyCompiled(Tiny):
    """Its block is compiled, by a backend that counts."""

    def __init__(self, counter: Any = None, **options: Any) -> None:
        super().__init__(**options)
        self.block = torch.compile(self.block, backend=counter or "eager")


def frames(counter: CompileCounter) -> int:
    return int(counter.frame_count)


# What torch warns of while it compiles would otherwise be an error in the middle of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_compiled(whole: bool, tmp_path: Path) -> None:
    """P106, L18: the average moves, validation computes with it, nothing compiles anew, and keys stay as they are."""
    counter, compiled, path = CompileCounter(), [], tmp_path / "last.ckpt"
    callback = EMAWeightAveraging(decay=DECAY)
    look = At("on_train_epoch_end", lambda t: compiled.append(frames(counter)))
    fitted = trainer(tmp_path, "single", [callback, look], max_epochs=3)
    model = Tiny() if whole else PartlyCompiled(counter)
    fitted.fit(torch.compile(model, backend=counter) if whole else model)
    fitted.save_checkpoint(path)
    assert compiled[0] > 0
    assert compiled[0] == compiled[-1]
    _, weights = plain_training(3 * NUM_BATCHES)
    expected = plain_average(weights)
    assert_same(full_average(callback), expected)
    assert float(fitted.callback_metrics["val_loss"]) == pytest.approx(
        plain_loss(with_weights(expected), 100), rel=1e-6
    )
    saved = torch.load(path, weights_only=True)
    assert list(saved["state_dict"]) == list(saved["current_model_state"]) == list(model.state_dict())
    assert whole != any("_orig_mod" in key for key in saved["state_dict"])
    for copy, values in {"state_dict": expected, "current_model_state": weights[3 * NUM_BATCHES]}.items():
        assert_same({key.replace("_orig_mod.", ""): value for key, value in saved[copy].items()}, values)
    resumed = EMAWeightAveraging(decay=DECAY)
    again = trainer(tmp_path, "single", [resumed], max_epochs=4)
    again.fit(Tiny() if whole else PartlyCompiled(), ckpt_path=path)
    assert_same(full_average(resumed), plain_average(plain_training(4 * NUM_BATCHES)[1]))
