"""The recipes of docs/deepspeed.md for Accelerate and Hugging Face's Trainer, as they stand there, where installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from sharded_avg import EMA, ShardedAverage
from tests.helpers.pool import ROOT, on_ranks
from tests.helpers.zero_engines import assert_same
from tests.unit.test_snippets import Block, blocks, run

PAGE = ROOT / "docs" / "deepspeed.md"
FOURTH = [False, False, False, True]

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def recipe(heading: str) -> Block:
    (found,) = [block for block in blocks("docs/deepspeed.md") if block.heading == heading]
    return found


class Watched(ShardedAverage):
    """With an average of full masters beside it, of which this package knows nothing."""

    def __init__(self, engine: Any, rule: EMA) -> None:
        super().__init__(engine, rule)
        self.engine, self.slow, self.counted = engine, dict[str, Tensor](), list[bool]()

    def update(self, **arguments: Any) -> bool:
        self.counted.append(super().update(**arguments))
        if self.counted[-1]:
            live = masters(self.engine)
            self.slow = {name: torch.lerp(self.slow.get(name, v), v, 1 - 0.999) for name, v in live.items()}
        return self.counted[-1]


class Net(nn.Module):
    """What a Trainer takes: a loss by name."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.down(torch.tanh(self.up(x.to(self.up.weight.dtype)))).float().square().mean()}


class Loss(Net):
    """The loss itself."""

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return super().forward(**batch)["loss"]


def examples(num: int) -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(3, generator=torch.Generator().manual_seed(n))} for n in range(num)]


def masters(engine: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(param).clone() for name, param in engine.module.named_parameters()}


def check(average: Watched) -> None:
    with average.summon_full_params(rank0_only=False) as full:
        assert_same(full, average.slow)


@on_ranks(2, kind="deepspeed")
def test_accelerate() -> None:
    """R30: an `update()` after every micro-batch counted 5 for 2 steps."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    as_it_stands = recipe("Accelerate")
    condition = "if accelerator.sync_gradients:"
    for code, counts in ((as_it_stands.code, [True]), (as_it_stands.code.replace(condition, "if True:"), FOURTH)):
        plugin = accelerate.DeepSpeedPlugin(hf_ds_config=dict(CONFIG))
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, deepspeed_plugin=plugin)
        torch.manual_seed(3)
        model = Loss()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        loader = torch.utils.data.DataLoader(examples(32), batch_size=2)
        names = {"accelerator": accelerator, "model": model, "optimizer": optimizer, "loader": loader}
        run(as_it_stands._replace(code=code), names := names | {"ShardedAverage": Watched, "EMA": EMA})
        average: Any = names["average"]
        assert average.num_steps >= 2
        assert average.counted == counts * average.num_steps
        check(average)
        average.engine.destroy()
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@on_ranks(2, kind="deepspeed")
def test_the_trainer_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    names: dict[str, Any] = {"TrainerCallback": transformers.TrainerCallback, "ShardedAverage": Watched, "EMA": EMA}
    run(recipe("Hugging Face's Trainer"), names)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4, use_cpu=True,
        bf16=True, deepspeed=CONFIG | {"gradient_clipping": 1.0}, report_to=[], save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True, label_names=["x"], learning_rate=0.1, prediction_loss_only=True,
    )  # fmt: skip
    torch.manual_seed(3)
    callback = names["callback"] = names["Averaging"]()
    trainer = names["trainer"] = transformers.Trainer(
        Net(), arguments, train_dataset=examples(64), eval_dataset=examples(8), callbacks=[callback]
    )
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        trainer.train()
        assert callback.average.counted == [True] * 3
        check(callback.average)
        raw = trainer.evaluate()["eval_loss"]
        (line,) = re.findall(r"`(with callback\.average\.swapped\(\): trainer\.evaluate\(\))`", PAGE.read_text())
        exec(line.replace("trainer.evaluate()", "averaged = trainer.evaluate()"), names)
        assert names["averaged"]["eval_loss"] != raw
        assert trainer.evaluate()["eval_loss"] == raw
    trainer.model_wrapped.destroy()
