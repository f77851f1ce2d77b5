"""What an evaluation sees: the average, the raw weights or both, by the metrics of plain models that hold them.

And what it leaves behind: nothing. The raw weights are back bit for bit, and training goes on as without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torchmetrics import MeanMetric

from sharded_avg import refreshed_batch_norm
from sharded_avg.lightning import EMAWeightAveraging

from .modules import NUM_BATCHES, Tiny, batches, loader
from .runs import Recorder, full_weights, module, run, trainer
from .strategies import STRATEGIES
from .test_every_strategy import DECAY, At, full_average, plain_average, with_weights
from .test_harness import NUM_STEPS, assert_same, over, plain_loss, plain_training

Weights = dict[str, Tensor]
CHOICES = ("average", "raw", "both")
FIRST = {"val_loss": 100, "test_loss": 200}  # batches of each evaluation begin at this number


def rows(*names: str) -> pytest.MarkDecorator:
    return over(lambda row: row in [STRATEGIES[name] for name in names])


def losses(metric: str, choice: str, average: Weights, raw: Weights) -> dict[str, float]:
    """What is logged under this name with `evaluate_with=choice`."""
    found = {}
    if choice != "raw":
        found[metric] = plain_loss(with_weights(average), first=FIRST[metric])
    if choice != "average":
        prefix = "raw/" if choice == "both" else ""
        found[prefix + metric] = plain_loss(with_weights(raw), first=FIRST[metric])
    return found


def the_averages(weights: dict[int, Weights]) -> dict[int, Weights]:
    """The average after each step."""
    return {step: plain_average({s: weights[s] for s in weights if s <= step}) for step in weights}


# -- during fit --------------------------------------------------------------------------------------------------------


class Looks(lightning.Callback):
    """Metrics and raw weights after each validation."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.weights: list[Weights] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            self.weights.append(full_weights(trainer))


def fit_validating(
    tmp_path: Path, name: str, arguments: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """One fit for each of these arguments: what was seen after each validation, and the raw weights of each step."""
    seen = []
    for some in arguments:
        callback, looks, recorder = EMAWeightAveraging(decay=DECAY, **some), Looks(), Recorder()
        fitted = trainer(tmp_path, name, [callback, looks, recorder], **settings)
        fitted.fit(module(name))
        seen.append({"metrics": looks.metrics, "weights": looks.weights, "steps": recorder.weights})
    return seen


@rows("single", "ddp", "fsdp_sharded", "fsdp2", "deepspeed_2")
def test_validation_during_fit(name: str, tmp_path: Path) -> None:
    """P03, P10, P90, P91: metrics of the average, of raw weights or of both; raw until the average begins.

    After a validation the raw weights are those of a plain loop, and so are those of each later step.
    """
    _, weights = plain_training(NUM_STEPS)
    late = {step: plain_average({s: weights[s] for s in range(4, step + 1)}) for step in weights if step > 3}
    averages, at = the_averages(weights), (2, 4, 6, 8)
    arguments = [*({"evaluate_with": choice} for choice in CHOICES), {"update_starting_at_step": 3}]
    expected = [[losses("val_loss", choice, averages[step], weights[step]) for step in at] for choice in CHOICES]
    expected.append([losses("val_loss", "average", late.get(step, weights[step]), {}) for step in at])
    for fits in run(name, fit_validating, tmp_path, name=name, arguments=arguments, settings={"val_check_interval": 2}):
        for number, (seen, metrics) in enumerate(zip(fits, expected, strict=True)):
            passes = 2 if CHOICES[number : number + 1] == ("both",) else 1
            for found, wanted in zip(seen["metrics"][passes - 1 :: passes], metrics, strict=True):
                assert found == pytest.approx(wanted, rel=1e-6)
            for found, step in zip(seen["weights"][passes - 1 :: passes], at, strict=True):
                assert_same(found, weights[step])
            assert {step: found for step, found in seen["steps"].items() if step}.keys() == weights.keys()
            for step, found in weights.items():
                assert_same(seen["steps"][step], found)
        averaged, _, both, _ = fits
        assert [each["val_loss"] for each in both["metrics"][1::2]] == [
            each["val_loss"] for each in averaged["metrics"]
        ]


class WithMetrics(Tiny):
    """A metric object, two loaders of validation, and a hook that logs; calls are counted in the sanity check, too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mean = MeanMetric()
        self.num_calls = 0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.num_calls += 1
        loss = self._loss(batch)
        self.mean.update(loss)
        self.log("val_loss", loss, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.log("mean", self.mean.compute(), sync_dist=True)
        self.log_dict({"twice": 2 * self.mean.compute()}, sync_dist=True)
        self.mean.reset()

    def val_dataloader(self) -> Any:
        return [loader(batches(2, first=100)), loader(batches(2, first=200))]


class MetricLogged(Tiny):
    """A metric object that Lightning computes and resets."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.mean = MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.mean(self._loss(batch))
        self.log("val_loss", self.mean)


def fit_both(tmp_path: Path, name: str) -> dict[str, Any]:
    """Two loaders and two checkpoint callbacks that monitor either; a metric object."""
    monitors = {"averaged": "val_loss/dataloader_idx_0", "raw": "raw/val_loss/dataloader_idx_0"}
    savers = [ModelCheckpoint(tmp_path / who, "{epoch}", monitor=monitor) for who, monitor in monitors.items()]
    counts: list[int] = []
    begins = At("on_train_start", lambda t: counts.append(t.lightning_module.num_calls))
    both = EMAWeightAveraging(decay=DECAY, evaluate_with="both")
    fitted = trainer(tmp_path, name, [both, begins, *savers])
    fitted.fit(module(name, WithMetrics))
    metrics = {key: float(value) for key, value in fitted.callback_metrics.items()}
    scores = [float(saver.best_model_score) for saver in savers]
    saved = [sorted(path.name for path in (tmp_path / who).iterdir()) for who in monitors]
    counts.append(fitted.lightning_module.num_calls)

    stopping = EarlyStopping("raw/val_loss", patience=1, mode="min")
    again = trainer(tmp_path, name, [stopping, EMAWeightAveraging(decay=DECAY, evaluate_with="both")], max_epochs=9)
    again.fit(module(name, MetricLogged))
    logged = {key: float(value) for key, value in again.callback_metrics.items()}
    return {
        "metrics": metrics,
        "scores": scores,
        "saved": saved,
        "counts": counts,
        "stopped": (again.current_epoch, again.global_step, stopping.wait_count, float(stopping.best_score)),
        "logged": logged,
    }


@rows("single", "fsdp2")
def test_both_in_one_validation(name: str, tmp_path: Path) -> None:
    """Metrics of each loader and of hooks; checkpoints and early stopping look at either, once for each validation.

    P22: the sanity check is of one pass, and nothing of it counts.
    """
    _, weights = plain_training(3 * NUM_BATCHES)
    averages = the_averages(weights)

    def plain(found: Weights, first: int) -> float:
        return plain_loss(with_weights(found), first=first)

    expected, ends = {}, {"": averages[NUM_STEPS], "raw/": weights[NUM_STEPS]}
    for prefix, end in ends.items():
        of_loaders = [plain(end, 100), plain(end, 200)]
        expected |= {f"{prefix}val_loss/dataloader_idx_{index}": loss for index, loss in enumerate(of_loaders)}
        mean = sum(of_loaders) / 2
        expected |= {f"{prefix}mean": mean, f"{prefix}twice": 2 * mean}
    epochs = [NUM_BATCHES, NUM_STEPS]
    raw = [plain(weights[step], 100) for step in (*epochs, 12)]
    for seen in run(name, fit_both, tmp_path, name=name):
        assert seen["metrics"] == pytest.approx(expected, rel=1e-6)
        assert seen["scores"] == pytest.approx([min(plain(averages[step], 100) for step in epochs), min(raw[:2])])
        assert seen["counts"] == [4, 4 + 2 * 2 * 4]  # the sanity check; two passes after each epoch
        assert raw[0] < raw[1]  # so it stops after two epochs
        assert seen["saved"] == [["epoch=0.ckpt"], ["epoch=0.ckpt"]]
        assert seen["stopped"] == (2, NUM_STEPS, 1, pytest.approx(raw[0]))
        ends = {"val_loss": plain(averages[NUM_STEPS], 100), "raw/val_loss": raw[1]}
        assert seen["logged"] == pytest.approx(ends, rel=1e-6)


# -- alone -------------------------------------------------------------------------------------------------------------

OPTIONS = [("average", "average"), ("raw", "average"), ("both", "average"), ("average", "raw"), ("both", "raw")]
COMBINATIONS = [
    *(("single", *options) for options in OPTIONS),
    *((name, "average", "raw") for name in ("ddp", "fsdp_sharded", "fsdp2", "deepspeed_2")),
    *((name, "both", "average") for name in ("ddp", "fsdp2")),
]


def evaluate_after(tmp_path: Path, name: str, evaluate_with: str, end_with: str) -> dict[str, Any]:
    """Everything that can be evaluated once `fit` is over."""
    row, folder = STRATEGIES[name], tmp_path / f"{evaluate_with}-{end_with}"

    def new() -> Any:
        ours = EMAWeightAveraging(decay=DECAY, evaluate_with=evaluate_with, end_with=end_with)  # type: ignore[arg-type]
        saver = ModelCheckpoint(folder, monitor="val_loss", save_top_k=2, save_last=True)
        return trainer(tmp_path, name, [ours, saver])

    fitted, model = new(), module(name)
    fitted.fit(model)
    saver = fitted.checkpoint_callback
    found: dict[str, Any] = {"end": full_weights(fitted)}
    paths = {"best": saver.best_model_path, "last": saver.last_model_path}

    def evaluate(which: str, runner: Any, model: Any, path: str | None) -> None:
        found[f"{which}: test"] = runner.test(model, ckpt_path=path, verbose=False)[0]
        found[f"{which}: validate"] = runner.validate(model, ckpt_path=path, verbose=False)[0]
        found[f"{which}: predict"] = torch.cat(runner.predict(model, ckpt_path=path))

    if row.runs_again:
        evaluate("memory", fitted, model, None)
        found["memory: weights"] = full_weights(fitted)
        for which, path in {"best": "best", "last": "last", "path": paths["best"]}.items():
            evaluate(which, fitted, model, path)
    for which, path in paths.items():
        found[f"fresh {which}: test"] = new().test(module(name), ckpt_path=path, verbose=False)[0]
        found[f"fresh {which}: validate"] = new().validate(module(name), ckpt_path=path, verbose=False)[0]
        found[f"fresh {which}: predict"] = torch.cat(new().predict(module(name), ckpt_path=path))
    return found


def predictions(weights: Weights) -> Tensor:
    model = with_weights(weights).eval()
    with torch.no_grad():
        return torch.cat([model(batch[0]) for batch in batches(2, first=300)])


def expected_after(evaluate_with: str, end_with: str, which: str, average: Weights, raw: Weights) -> dict[str, Any]:
    """With the weights in memory, "raw" leaves alone what the end of training has put there."""
    choice = end_with if which == "memory" and evaluate_with == "raw" else evaluate_with
    return {
        "test": losses("test_loss", choice, average, raw),
        "validate": losses("val_loss", choice, average, raw),
        "predict": predictions(raw if choice == "raw" else average),
    }


@pytest.mark.own_processes
@pytest.mark.parametrize(("name", "evaluate_with", "end_with"), COMBINATIONS)
def test_evaluations_after_fit(name: str, evaluate_with: str, end_with: str, tmp_path: Path) -> None:
    """P07, P17, L4: validate, test and predict use one copy: of memory, of "best", "last" and a path, anywhere."""
    _, weights = plain_training(NUM_STEPS)
    averages = the_averages(weights)
    copies = {step: (averages[step], weights[step]) for step in (NUM_BATCHES, NUM_STEPS)}
    val_losses = [[plain_loss(with_weights(copy), first=100) for copy in pair] for pair in copies.values()]
    assert val_losses[0][0] < val_losses[1][0]
    assert val_losses[0][1] < val_losses[1][1]
    for found in run(name, evaluate_after, tmp_path, name=name, evaluate_with=evaluate_with, end_with=end_with):
        end = copies[NUM_STEPS][0 if end_with == "average" else 1]
        for key in ("end", "memory: weights"):
            if weights_then := found.pop(key, None):
                assert_same(weights_then, end)
        for key, value in found.items():
            which, what = key.split(": ")
            pair = copies[NUM_BATCHES if "best" in which or which == "path" else NUM_STEPS]
            expected = expected_after(evaluate_with, end_with, which, *pair)[what]
            if what == "predict":
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, msg=lambda text, key=key: key + text)
            else:
                assert value == pytest.approx(expected, rel=1e-6), key


# -- what else is in the model -----------------------------------------------------------------------------------------


class Buffers(Tiny):
    """BatchNorm; an integer and a bool buffer that must never change; what validation found in them is kept."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("index", torch.arange(512))
        self.register_buffer("mask", torch.arange(7) % 2 == 0)
        self.found: list[Weights] = []

    def on_validation_epoch_end(self) -> None:
        names = ("shift", "calls", "index", "mask", "norm.running_mean", "norm.num_batches_tracked")
        if not self.trainer.sanity_checking:
            self.found.append({name: self.get_buffer(name).clone() for name in names})


def fit_with_buffers(tmp_path: Path, name: str, use_buffers: bool, **settings: Any) -> dict[str, Any]:
    ours = EMAWeightAveraging(decay=0.9, use_buffers=use_buffers, update_every_n_steps=1 if use_buffers else 8)
    looks, model = Looks(), module(name, Buffers, norm=True)
    fitted = trainer(tmp_path, name, [ours, looks], **settings)
    fitted.fit(model)
    return {"found": model.found, "weights": looks.weights, "metrics": looks.metrics, "average": full_average(ours)}


def with_norm(weights: Weights) -> Tiny:
    model = Tiny(norm=True)
    model.load_state_dict({name: value for name, value in weights.items() if name not in ("index", "mask")})
    return model


@rows("single", "ddp", "fsdp2")
def test_buffers_that_are_not_averaged(name: str, tmp_path: Path) -> None:
    """P39, L14: they are the live ones of the moment, not those of the last update, seven steps ago."""
    _, weights = plain_training(NUM_STEPS, norm=True)
    parameters = dict(Tiny(norm=True).named_parameters())
    for seen in run(name, fit_with_buffers, tmp_path, name=name, use_buffers=False):
        for number, step in enumerate((NUM_BATCHES, NUM_STEPS)):
            live = weights[step]
            for buffer in ("shift", "calls", "norm.running_mean", "norm.num_batches_tracked"):
                assert torch.equal(seen["found"][number][buffer], live[buffer])
            mixed = {key: weights[1][key] if key in parameters else value for key, value in live.items()}
            loss = plain_loss(with_norm(mixed), first=100)
            assert seen["metrics"][number]["val_loss"] == pytest.approx(loss, rel=1e-6)


@rows("single", "ddp", "fsdp2", "deepspeed_2")
def test_integer_and_bool_buffers(name: str, tmp_path: Path) -> None:
    """P47, L10, L11: copied, whatever the decay; those that count are live while the average is validated."""
    _, weights = plain_training(NUM_STEPS, norm=True)
    for seen in run(name, fit_with_buffers, tmp_path, name=name, use_buffers=True):
        for found in (*seen["found"], seen["average"], seen["weights"][-1]):
            assert torch.equal(found["index"], torch.arange(512))
            assert torch.equal(found["mask"], torch.arange(7) % 2 == 0)
        assert [int(found["calls"]) for found in seen["found"]] == [NUM_BATCHES, NUM_STEPS]
        assert [int(found["norm.num_batches_tracked"]) for found in seen["found"]] == [NUM_BATCHES, NUM_STEPS]
        average = plain_average(weights, 0.9)
        assert_same(seen["found"][1], {key: seen["average"][key] for key in seen["found"][1]})
        assert_same({key: seen["average"][key] for key in average}, average)


@pytest.mark.own_processes
@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("use_buffers", [True, False])
def test_inference_mode(inference_mode: bool, use_buffers: bool, tmp_path: Path) -> None:
    """P90: what is exchanged in inference mode can be trained on."""
    settings = {"inference_mode": inference_mode, "val_check_interval": 1}
    _, weights = plain_training(NUM_STEPS, norm=True)
    seen = fit_with_buffers(tmp_path, "single", use_buffers, **settings)
    assert len(seen["weights"]) == NUM_STEPS
    for step, found in enumerate(seen["weights"], start=1):
        assert_same({key: found[key] for key in weights[step]}, weights[step])


def fit_in_bf16(tmp_path: Path, name: str) -> dict[str, Any]:
    ours, looks, recorder = EMAWeightAveraging(decay=0.99), Looks(), Recorder()
    options = {"bf16": {"enabled": True}} if name.startswith("deepspeed") else {}
    fitted = trainer(tmp_path, name, [ours, looks, recorder], options=options, precision="bf16-true")
    fitted.fit(module(name, InBf16))
    return {"steps": recorder.weights, "looks": looks.weights, "average": full_average(ours)}


class InBf16(Tiny):
    """Its loss is in fp32; DeepSpeed's engine casts no inputs of a Trainer's."""

    def _loss(self, batch: Any) -> Tensor:
        x, y = batch
        return (self(x.to(self.head.weight.dtype)).float() - y.float()).square().mean()


@rows("single", "fsdp2", "deepspeed_2")
def test_bf16_weights_have_an_average_in_fp32(name: str, tmp_path: Path) -> None:
    """L12, P55, P56: a validation after each epoch rounds neither the average nor, under ZeRO, the masters."""
    for seen in run(name, fit_in_bf16, tmp_path, name=name):
        steps = {step: seen["steps"][step] for step in sorted(seen["steps"]) if step}
        parameters = [key for key in steps[1] if key not in ("shift", "calls")]
        wide = {step: {key: weights[key].float() for key in parameters} for step, weights in steps.items()}
        assert_same({key: seen["average"][key] for key in parameters}, plain_average(wide, 0.99))
        rounded = {key: seen["average"][key].bfloat16().float() for key in parameters}
        assert any(not torch.equal(rounded[key], seen["average"][key]) for key in parameters)
        for weights, step in zip(seen["looks"], (NUM_BATCHES, NUM_STEPS), strict=True):
            assert_same(weights, steps[step])


class Refreshed(Tiny):
    """Recomputes BatchNorm statistics for what is validated, as the guide says."""

    refresh = ExitStack()

    def on_validation_epoch_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.refresh = ExitStack()
            self.refresh.enter_context(refreshed_batch_norm(self, batches(NUM_BATCHES)))

    def on_validation_epoch_end(self) -> None:
        self.refresh.close()


def fit_refreshed(tmp_path: Path, name: str, use_buffers: bool) -> dict[str, Any]:
    ours, looks, recorder = EMAWeightAveraging(decay=DECAY, use_buffers=use_buffers), Looks(), Recorder()
    trainer(tmp_path, name, [ours, looks, recorder]).fit(module(name, Refreshed, norm=True))
    return {"metrics": looks.metrics, "steps": recorder.weights}


@rows("single", "ddp", "fsdp2")
@pytest.mark.parametrize("use_buffers", [True, False])
def test_batch_norm_refreshed_for_the_average(name: str, use_buffers: bool, tmp_path: Path) -> None:
    """P32: validated with statistics of the average's own; those of training are as if there had been none."""
    _, weights = plain_training(NUM_STEPS, norm=True)
    wanted = []
    for step in (NUM_BATCHES, NUM_STEPS):
        average = plain_average({s: weights[s] for s in range(1, step + 1)})
        model = with_norm(average if use_buffers else average | {"shift": weights[step]["shift"]})
        data: list[Any] = [x for x, _ in batches(NUM_BATCHES)]
        torch.optim.swa_utils.update_bn(data, model)
        wanted.append(plain_loss(model, first=100))
    for seen in run(name, fit_refreshed, tmp_path, name=name, use_buffers=use_buffers):
        assert [each["val_loss"] for each in seen["metrics"]] == pytest.approx(wanted, rel=1e-6)
        for step, found in weights.items():
            assert_same(seen["steps"][step], found)


# -- before there is an average ----------------------------------------------------------------------------------------


def fit_too_short(tmp_path: Path, name: str) -> dict[str, Any]:
    """An average that would begin later than training ends."""
    row, path = STRATEGIES[name], tmp_path / "end.ckpt"
    late = EMAWeightAveraging(decay=DECAY, update_starting_at_step=100)
    saver = At("on_train_end", lambda t: t.save_checkpoint(path))
    fitted = trainer(tmp_path, name, [late, saver])
    fitted.fit(module(name))
    found = {"end": full_weights(fitted), "nbytes": late.average.nbytes, "val_loss": _val_loss(fitted)}
    fresh = trainer(tmp_path, name, [EMAWeightAveraging(decay=DECAY)])
    found["test_loss"] = fresh.test(module(name), ckpt_path=path, verbose=False)[0]["test_loss"]
    if not row.writes_folder:
        found["file"] = torch.load(path, weights_only=True)["state_dict"]
    return found


def _val_loss(fitted: Any) -> float:
    return float(fitted.callback_metrics["val_loss"])


@rows("single", "ddp", "fsdp2", "deepspeed_2")
def test_no_average_yet(name: str, tmp_path: Path) -> None:
    """P03, P10, L1, L2: the model, its metrics and its checkpoints have the raw weights; nothing is allocated."""
    _, weights = plain_training(NUM_STEPS)
    raw = with_weights(weights[NUM_STEPS])
    for found in run(name, fit_too_short, tmp_path, name=name):
        assert_same(found["end"], weights[NUM_STEPS])
        assert_same(found.get("file", weights[NUM_STEPS]), weights[NUM_STEPS])
        assert found["nbytes"] == 0
        assert found["val_loss"] == pytest.approx(plain_loss(raw, first=100), rel=1e-6)
        assert found["test_loss"] == pytest.approx(plain_loss(raw, first=200), rel=1e-6)
