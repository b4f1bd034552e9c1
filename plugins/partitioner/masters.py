"""What the optimizer works on where the model computes in fewer bits: copies in float32, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from drivetrain.contracts.precision import Dtypes

NamedParameter = tuple[str, torch.nn.Parameter]


class Masters:
    """For each trainable parameter, what the optimizer is handed: the parameter itself where its dtype is good enough
    for that, else a copy in float32.

    A copy either stays (master weights), or is made before each step and dropped after it; then its bits beyond the
    parameter's are lost between steps, which stochastic rounding makes up for on average.
    """

    def __init__(self, named: Iterable[tuple[str, torch.nn.Parameter, torch.Tensor]], dtypes: Dtypes) -> None:
        """named: (name, parameter in ``dtypes.param``, its values in the dtype that they came in, and on the device
        where the optimizer works)."""
        self._dtypes = dtypes
        self.rounds = torch.zeros((), dtype=torch.int64)
        """How often values were rounded at random: the seed of the next time, which is the same on every rank."""
        self.keeps_copies = dtypes.master_weight is not None
        self.named: list[tuple[str, torch.nn.Parameter, torch.nn.Parameter]] = []
        """(name, parameter, what the optimizer works on), in the order of the model."""
        for name, parameter, values in named:
            target = parameter
            is_coarse = needs_copy(values.dtype, dtypes)
            if is_coarse or values.device != parameter.device:
                dtype = wide_dtype(dtypes) if is_coarse else parameter.dtype
                target = torch.nn.Parameter(values.detach().to(dtype, copy=True))
            self.named.append((name, parameter, target))
        self._copies = [(parameter, target) for _, parameter, target in self.named if target is not parameter]
        if not self.keeps_copies:
            self._drop()

    @classmethod
    def of_model(cls, model: torch.nn.Module, dtypes: Dtypes) -> Masters:
        """Of all trainable parameters. Turns those of the model into ``dtypes.param``, frozen ones too."""
        param: torch.dtype = getattr(torch, dtypes.param)
        named = []
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            values = parameter.data
            if parameter.dtype != param:
                parameter.data = values.to(param)
            if parameter.requires_grad:
                named.append((name, parameter, values))
        return cls(named, dtypes)

    @property
    def for_optimizer(self) -> Sequence[NamedParameter]:
        return [(name, target) for name, _, target in self.named]

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Have every step of ``optimizer`` end with the model's parameters as it left the copies."""
        if self._copies:
            optimizer.register_step_pre_hook(lambda *_: self.fill())
            optimizer.register_step_post_hook(lambda *_: self.publish())

    @torch.no_grad()
    def publish(self) -> None:
        """Give the model the values of the copies."""
        if self._dtypes.rounding == "stochastic":
            self._round_at_random()
        else:
            for parameter, target in self._copies:
                parameter.copy_(target)
        if not self.keeps_copies:
            self._drop()

    def _round_at_random(self) -> None:
        generators: dict[torch.device, torch.Generator] = {}
        for parameter, target in self._copies:
            device = target.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(int(self.rounds))
            parameter.copy_(round_stochastically(target, parameter.dtype, generators[device]))
        self.rounds += 1

    @torch.no_grad()
    def fill(self) -> None:
        """Make the copies that do not stay."""
        if not self.keeps_copies:
            for parameter, target in self._copies:
                target.untyped_storage().resize_(target.numel() * target.element_size())
                target.copy_(parameter)

    def _drop(self) -> None:
        for _, target in self._copies:
            target.untyped_storage().resize_(0)


def wide_dtype(dtypes: Dtypes) -> torch.dtype:
    """What the optimizer works in where parameters are too coarse for it."""
    dtype: torch.dtype = getattr(torch, dtypes.master_weight or dtypes.reduce)
    return dtype


def needs_copy(came_in: torch.dtype, dtypes: Dtypes) -> bool:
    """Whether the optimizer works on a copy of a parameter that came in this dtype."""
    param: torch.dtype = getattr(torch, dtypes.param)
    wide = wide_dtype(dtypes)
    return param.itemsize < wide.itemsize and came_in.itemsize <= wide.itemsize


def round_stochastically(
    wide: torch.Tensor, dtype: torch.dtype, generator: torch.Generator | None = None
) -> torch.Tensor:
    """float32 -> bfloat16, up or down with the probabilities that keep the mean: random bits are added below the last
    that stays, and the rest is cut off."""
    assert dtype == torch.bfloat16, "only bfloat16 is the upper half of a float32"
    bits = wide.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    rounded = (bits + noise).bitwise_and_(-65536).view(torch.float32)
    return torch.where(wide.isfinite(), rounded, wide).to(dtype)
