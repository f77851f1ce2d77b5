"""The recipes of docs/deepspeed.md for Accelerate and Hugging Face's Trainer, where those are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from sharded_avg import EMA, ShardedAverage
from tests.helpers.pool import on_ranks
from tests.helpers.zero_engines import assert_same

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


class Net(nn.Module):
    """What a Trainer takes: a loss by name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.down(torch.tanh(self.up(x.to(self.up.weight.dtype)))).float().square().mean()}


def examples(num: int) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(3, generator=torch.Generator().manual_seed(n))} for n in range(num)]


def masters(engine: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(param).clone() for name, param in engine.module.named_parameters()}


@on_ranks(2, kind="deepspeed")
def test_accelerate() -> None:
    """R30: an `update()` after every micro-batch counted 5 for 2 steps."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    plugin = accelerate.DeepSpeedPlugin(hf_ds_config=CONFIG)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, deepspeed_plugin=plugin)
    torch.manual_seed(3)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(examples(32), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    average, slow, counted = ShardedAverage(model, EMA(decay=0.5)), dict[str, Tensor](), []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
        counted.append(average.update())
        if accelerator.sync_gradients:
            slow = {name: torch.lerp(slow.get(name, live), live, 0.5) for name, live in masters(model).items()}
    assert len(counted) >= 8
    assert counted == [False, False, False, True] * (len(counted) // 4)
    with average.summon_full_params(rank0_only=False) as full:
        assert_same(full, slow)
    model.destroy()
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@on_ranks(2, kind="deepspeed")
def test_the_trainer_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    class Averaging(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        average: ShardedAverage | None = None
        slow: dict[str, Tensor] | None = None

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if self.average is None:
                self.average = ShardedAverage(trainer.model_wrapped, EMA(decay=0.5))
            assert self.average.update()
            live = masters(trainer.model_wrapped)
            slow = self.slow or live
            self.slow = {name: torch.lerp(slow[name], value, 0.5) for name, value in live.items()}

    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4, use_cpu=True,
        bf16=True, deepspeed=CONFIG | {"gradient_clipping": 1.0}, report_to=[], save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    torch.manual_seed(3)
    callback = Averaging()
    trainer = transformers.Trainer(Net(), arguments, train_dataset=examples(64), callbacks=[callback])
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        trainer.train()
    assert callback.average is not None
    assert callback.average.num_steps == 3
    with callback.average.summon_full_params(rank0_only=False) as full:
        assert callback.slow is not None
        assert_same(full, callback.slow)
    trainer.model_wrapped.destroy()
