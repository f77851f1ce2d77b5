"""Lightning's callback in real Trainers of one device, under each strategy."""

from __future__ import annotations

import logging
import tempfile
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sharded_avg import load_averaged_state_dict

from ..check import check, optional
from ..devices import is_gpu
from ..reference import (
    DECAY,
    Block,
    ByHand,
    Frozen,
    Net,
    State,
    assert_same,
    batch,
    clean,
    ema,
    loss_of,
    trained,
    weights,
)

ROOM = "trainer"
BATCHES = 5
EPOCHS = 2
OVERFLOWS = (2, 3)  # batches of each epoch


def _module(device: torch.device, *, overflows: tuple[int, ...] = (), fused: bool = False) -> Any:
    """A LightningModule around the model; its class is made here, because Lightning may not be installed."""
    lightning = optional("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.net = Net()
            self.losses: list[Tensor] = []

        def configure_model(self) -> None:
            mesh = getattr(self, "device_mesh", None)
            if mesh is not None:
                from torch.distributed.fsdp import fully_shard

                for part in (*self.net.blocks, self.net.frozen, self.net):
                    fully_shard(part, mesh=mesh["data_parallel"])

        def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
            loss = loss_of(self.net(x))
            return loss * float("inf") if batch_idx in overflows else loss

        def validation_step(self, x: Tensor, batch_idx: int) -> None:
            self.log("val_loss", loss_of(self.net(x)))

        def configure_optimizers(self) -> Any:
            params = [param for param in self.parameters() if param.requires_grad]
            return torch.optim.AdamW(params, lr=0.01, fused=fused) if fused else torch.optim.AdamW(params, lr=0.01)

        def train_dataloader(self) -> Any:
            return DataLoader([batch(step, torch.device("cpu"))[0] for step in range(BATCHES)], batch_size=1)

        def val_dataloader(self) -> Any:
            return DataLoader([batch(100, torch.device("cpu"))[0]], batch_size=1)

    return Module()


def _fit(
    device: torch.device, module: Any, folder: str, *, strategy: Any = "auto", more: Any = (), **options: Any
) -> Any:
    """Train; the callback, when it is over."""
    lightning = optional("lightning.pytorch")
    from sharded_avg.lightning import EMAWeightAveraging

    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    callback = EMAWeightAveraging(decay=DECAY)
    keeper = lightning.callbacks.ModelCheckpoint(dirpath=folder, filename="kept", every_n_epochs=EPOCHS)
    trainer = lightning.Trainer(
        accelerator="gpu" if is_gpu(device) else "cpu",
        devices=1,
        strategy=strategy,
        max_epochs=EPOCHS,
        callbacks=[callback, *more, keeper],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # it shuffles
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning advises more workers, and the like
        trainer.fit(module)
    return callback, trainer, f"{folder}/kept.ckpt"


def _watch(hand: ByHand, overflows: tuple[int, ...] = ()) -> Any:
    """A callback that keeps the average by hand, and compares what validation sees."""
    lightning = optional("lightning.pytorch")

    class Watch(lightning.Callback):
        validations = 0
        raw: State | None = None

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if self.raw is not None:
                assert_same(trained(pl_module.net), self.raw, "back in training")

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx not in overflows:
                hand.take(trained(pl_module.net))
            self.raw = weights(pl_module.net)

        def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            assert_same(trained(pl_module.net), hand.average, "validation")
            self.validations += 1

    return Watch()


@check("one device: validation sees the formula's bits, fit ends with them, checkpoints hold them", room=ROOM)
def one_device(device: torch.device) -> str:
    hand = ByHand(ema)
    watch = _watch(hand)
    module = _module(device)
    with tempfile.TemporaryDirectory() as folder:
        callback, trainer, path = _fit(device, module, folder, more=[watch])
        assert_same(trained(module.net), hand.average, "after fit")
        trainer.save_checkpoint(f"{folder}/later.ckpt")
        for file in (path, f"{folder}/later.ckpt"):
            saved = {name.removeprefix("net."): value for name, value in load_averaged_state_dict(file).items()}
            assert_same(saved, hand.average, f"the checkpoint {Path(file).name}")
    assert watch.validations == EPOCHS
    assert callback.average.n_averaged == EPOCHS * BATCHES
    return f"{callback.average.n_averaged} updates"


@check("a GradScaler's skipped steps are no updates, also of a fused optimizer", room=ROOM)
def skipped_steps(device: torch.device) -> str:
    optional("lightning.pytorch")
    from lightning.pytorch.plugins import MixedPrecision

    counts = []
    for fused in (False, True):
        hand = ByHand(ema)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10)
        module = _module(device, overflows=OVERFLOWS, fused=fused)
        plugin = MixedPrecision("16-mixed", device.type, scaler=scaler)
        with tempfile.TemporaryDirectory() as folder:
            more = [_watch(hand, OVERFLOWS)]
            callback, _, _ = _fit(device, module, folder, more=more, plugins=[plugin])
        expected = EPOCHS * (BATCHES - len(OVERFLOWS))
        assert callback.average.n_averaged == callback.average.num_steps == expected, callback.average.n_averaged
        assert_same(trained(module.net), hand.average, f"fused={fused}, after fit")
        counts.append(f"{expected} of {EPOCHS * BATCHES}")
    return " and ".join(counts)


def _fsdp(state_dict_type: str) -> Any:
    from lightning.pytorch.strategies import FSDPStrategy

    return FSDPStrategy(auto_wrap_policy={Block, Frozen}, state_dict_type=state_dict_type)


def _parallel() -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)


def _zero(stage: int) -> Any:
    optional("deepspeed")
    from lightning.pytorch.strategies import DeepSpeedStrategy

    return DeepSpeedStrategy(
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,  # 1.0 by default
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 8},
        }
    )


# Lightning's own wants a GPU for FSDP and DeepSpeed.
STRATEGIES: dict[str, tuple[Any, bool]] = {
    "ddp": (lambda: "ddp", False),
    "fsdp": (partial(_fsdp, "full"), True),
    "fsdp_sharded": (partial(_fsdp, "sharded"), True),
    "model_parallel": (_parallel, False),
    "deepspeed_1": (partial(_zero, 1), True),
    "deepspeed_2": (partial(_zero, 2), True),
    "deepspeed_3": (partial(_zero, 3), True),
}


def _enter(name: str, make: Any, needs_gpu: bool) -> None:
    @check(
        "fit, validate, save; the average is one device's, bit for bit or nearly",
        room=ROOM,
        needs_gpu=needs_gpu,
        name=name,
    )
    def under_strategy(device: torch.device) -> str:
        # DeepSpeed keeps the groups that its first engine made: they must outlive it. Its checks are the room's last.
        return _beside_one_device(device, make, leave=not name.startswith("deepspeed"))


for _name, (_make, _needs_gpu) in STRATEGIES.items():
    _enter(_name, _make, _needs_gpu)


def _beside_one_device(device: torch.device, make: Any, *, leave: bool) -> str:
    expected, loss = _on_one_device(device)
    try:
        with tempfile.TemporaryDirectory() as folder:
            found, other_loss = _average_of(_fit(device, _module(device), folder, strategy=make()))
    finally:
        if leave:
            _leave()
    missing = expected.keys() - found.keys()
    assert not missing, f"the checkpoint's average has no {sorted(missing)}"
    worst = max(float((found[name].float() - value.float()).abs().max()) for name, value in expected.items())
    assert worst <= 1e-5, f"the average is off by {worst}"
    assert abs(other_loss - loss) <= 1e-5, f"val_loss is {other_loss}, not {loss}"
    return "equal bits" if not worst else f"off by {worst:.1e} at most"


@cache
def _on_one_device(device: torch.device) -> tuple[dict[str, Tensor], float]:
    with tempfile.TemporaryDirectory() as folder:
        return _average_of(_fit(device, _module(device), folder))


def _average_of(fitted: Any) -> tuple[dict[str, Tensor], float]:
    """What the checkpoint has of it, of what is trained; and the last validation."""
    callback, trainer, path = fitted
    assert callback.average.n_averaged == EPOCHS * BATCHES, callback.average.n_averaged
    named = {clean(name): value for name, value in load_averaged_state_dict(path).items()}
    names = [f"net.{name}" for name in trained(Net())]
    return {name: named[name] for name in names if name in named}, float(trainer.callback_metrics["val_loss"])


def _leave() -> None:
    """The next Trainer makes a job of its own."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
