"""The model that is averaged, and averages of clones by plain formulas: nothing of the package is used here.

Net        odd sizes, a parameter of one element, a frozen layer, buffers
Formula    the next average from the average, the weights and the number of updates so far; lists of whole tensors
ByHand     averages of clones, kept by a Formula
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
Formula = Callable[[list[Tensor], list[Tensor], int], None]  # in place; called with a number of updates >= 1

DECAY = 0.9
WIDTH = 37
NUM_INPUTS = 13
_WRAPPERS = ("module.", "_fsdp_wrapped_module.", "_orig_mod.")


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, 54)
        self.narrow = nn.Linear(54, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.tensor([0.75]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.narrow(torch.tanh(self.wide(x)))


class Frozen(nn.Module):
    """Parameters that are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.mix(x))


class Net(nn.Module):
    """(batch, 13) -> (batch, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(NUM_INPUTS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.frozen = Frozen()
        self.last = nn.Linear(WIDTH, 5)
        self.register_buffer("shift", torch.full((WIDTH,), 0.125))
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.shift.to(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.last(x + self.frozen(x))


def net(device: torch.device, dtype: torch.dtype = torch.float32) -> Net:
    """The same weights each time; they are drawn on the CPU."""
    torch.manual_seed(5)
    return Net().to(device, dtype)


def batch(step: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(8, NUM_INPUTS, generator=torch.Generator().manual_seed(step)).to(device, dtype)


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().mean()


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    loss_of(model(x)).backward()
    optimizer.step()
    optimizer.zero_grad()


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """What a validation computes; the model is in training mode afterwards."""
    model.eval()
    with torch.no_grad():
        result: Tensor = model(x).clone()
    model.train()
    return result


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Under the names of the module that was wrapped."""
    return {clean(name): param for name, param in model.named_parameters() if param.requires_grad}


def clean(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def weights(model: nn.Module) -> State:
    """Clones of what is trained."""
    return {name: param.detach().clone() for name, param in trained(model).items()}


@contextmanager
def having(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the model holds other values, written into its tensors by hand."""
    params, raw = trained(model), weights(model)
    with torch.no_grad():
        for name, value in values.items():
            params[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in raw.items():
                params[name].copy_(value)


# -- formulas ----------------------------------------------------------------------------------------------------------


def lerp(weight: Callable[[int], float]) -> Formula:
    """average += w(n) * (live - average), by the call that torch.optim.swa_utils makes."""

    def formula(average: list[Tensor], live: list[Tensor], n: int) -> None:
        torch._foreach_lerp_(average, live, weight(n))

    return formula


ema = lerp(lambda n: 1 - DECAY)
warming = lerp(lambda n: 1 - min(DECAY, (1 + n) / (10 + n)))
swa = lerp(lambda n: 1 / (n + 1))


class ByHand:
    """Averages of clones; fp32 unless told otherwise, `None` for each tensor's own dtype."""

    def __init__(self, formula: Formula = warming, dtype: torch.dtype | None = torch.float32) -> None:
        self.average: State = {}
        self.n = 0
        self._formula, self._dtype = formula, dtype

    @torch.no_grad()
    def take(self, live: Mapping[str, Tensor]) -> None:
        """One update; the first copies."""
        now = {name: tensor.detach().to(self._dtype or tensor.dtype, copy=True) for name, tensor in live.items()}
        if self.n:
            self._formula([self.average[name] for name in now], list(now.values()), self.n)
        else:
            self.average = now
        self.n += 1

    def clone(self) -> State:
        return {name: tensor.clone() for name, tensor in self.average.items()}


# -- comparing ---------------------------------------------------------------------------------------------------------


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Every bit of every expected tensor; dtypes too, devices may differ. `found` may have more."""
    for name, tensor in expected.items():
        assert name in found, f"{what}: {name} is missing"
        mine = found[name].detach()
        assert mine.dtype == tensor.dtype, f"{what}: {name} is {mine.dtype}, not {tensor.dtype}"
        assert mine.shape == tensor.shape, f"{what}: {name} has shape {tuple(mine.shape)}, not {tuple(tensor.shape)}"
        there = mine.to(tensor.device)
        if not torch.equal(there, tensor):
            differing, total = int((there != tensor).sum()), tensor.numel()
            raise AssertionError(f"{what}: {differing} of {total} elements of {name} differ")


def cast(values: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    """Each value in the dtype of its namesake."""
    return {name: value.to(like[name].dtype) for name, value in values.items()}
