"""Rotary position embeddings: the frequencies of each published way to scale them, and the angles of a step.

Shapes: T tokens; R rotary dims of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RopeConfig:
    """How positions become angles. Fields that a kind does not use keep their defaults.

    kind:            one of ``ROPE_KINDS``.
    theta:           base of the wavelengths.
    rotary_size:     dims of a head that are rotated (R), an even number.
    max_position:    positions the model is said to handle.
    factor:          by how much the context was stretched.
    original_length: positions the model was first trained for; what the stretched kinds scale from.
    low_freq_factor, high_freq_factor: (llama3) bounds of the blended band, in wavelengths over the original length.
    attention_factor: (yarn, longrope) factor on cos and sin; None derives it.
    beta_fast, beta_slow: (yarn) rotations over the original length that bound the blended band.
    mscale, mscale_all_dim: (yarn) weights of the two terms that derive the attention factor; 0 leaves them out.
    truncate:        (yarn) round the band to whole dims.
    short_factors, long_factors: (longrope) a divisor for each frequency, R / 2 of them.
    use_long_factors: (longrope) which of the two sets all positions use.
    """

    kind: str
    theta: float
    rotary_size: int
    max_position: int
    factor: float | None = None
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    use_long_factors: bool = False

    @property
    def stretch(self) -> float:
        """The factor, or what the lengths say where the files leave it out."""
        return self.factor if self.factor is not None else self.max_position / self.original_length


Frequencies = tuple[torch.Tensor, float]
"""Radians per position, float32 [R / 2] on the CPU, and the factor on cos and sin."""


def _exponents(rope: RopeConfig) -> torch.Tensor:
    return torch.arange(0, rope.rotary_size, 2, dtype=torch.float32, device="cpu") / rope.rotary_size


def _plain(rope: RopeConfig) -> Frequencies:
    """Su et al. 2021, "RoFormer", section 3.2.2."""
    return 1.0 / rope.theta ** _exponents(rope), 1.0


def _linear(rope: RopeConfig) -> Frequencies:
    """Position interpolation: Chen et al. 2023, "Extending Context Window of Large Language Models", equation 4."""
    frequencies, scale = _plain(rope)
    return frequencies / rope.stretch, scale


def _llama3(rope: RopeConfig) -> Frequencies:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended. Source: Meta's release of the
    model (models/llama3/reference_impl/model.py, apply_scaling)."""
    frequencies, scale = _plain(rope)
    wavelengths = 2 * math.pi / frequencies
    longest_kept = rope.original_length / rope.high_freq_factor
    shortest_stretched = rope.original_length / rope.low_freq_factor
    keep = (rope.original_length / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - keep) * frequencies / rope.stretch + keep * frequencies
    scaled = torch.where(wavelengths > shortest_stretched, frequencies / rope.stretch, frequencies)
    is_between = (wavelengths >= longest_kept) & (wavelengths <= shortest_stretched)
    return torch.where(is_between, blended, scaled), scale


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """Peng et al. 2023, "YaRN", equation 22; the quotient of two weighted terms is DeepSeek's extension of it."""

    def term(weight: float) -> float:
        return 1.0 if rope.stretch <= 1 else 0.1 * weight * math.log(rope.stretch) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return term(rope.mscale) / term(rope.mscale_all_dim)
    return term(1.0)


def _yarn(rope: RopeConfig) -> Frequencies:
    """Peng et al. 2023, "YaRN", section 3.2: dims that turn often are kept, dims that turn seldom interpolated."""

    def dim_that_turns(rotations: float) -> float:
        return (
            rope.rotary_size * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    low, high = dim_that_turns(rope.beta_fast), dim_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_size - 1)
    width = high - low if high != low else 0.001  # a band of no width is a step, not a division by zero
    ramp = ((torch.arange(rope.rotary_size // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    wavelengths = rope.theta ** _exponents(rope)
    kept, interpolated = 1.0 / wavelengths, 1.0 / (rope.stretch * wavelengths)
    return interpolated * ramp + kept * (1 - ramp), _yarn_attention_factor(rope)


def _longrope(rope: RopeConfig) -> Frequencies:
    """Ding et al. 2024, "LongRoPE", with the attention factor of Phi-3's release."""
    factors = rope.long_factors if rope.use_long_factors else rope.short_factors
    frequencies = 1.0 / (torch.tensor(factors, dtype=torch.float32, device="cpu") * rope.theta ** _exponents(rope))
    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    if rope.stretch <= 1:
        return frequencies, 1.0
    return frequencies, math.sqrt(1 + math.log(rope.stretch) / math.log(rope.original_length))


ROPE_KINDS: Mapping[str, Callable[[RopeConfig], Frequencies]] = {
    "default": _plain,
    "linear": _linear,
    # NTK scaling changes the frequencies only beyond max_position, where no request is let through.
    "dynamic": _plain,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""Every way to scale, by the name that ``config.json`` gives it."""


class RotaryEmbedding(torch.nn.Module):
    """Turns positions into the cos and sin that the layers rotate queries and keys by."""

    frequencies: torch.Tensor

    def __init__(self, rope: RopeConfig, dtype: torch.dtype, device: torch.device) -> None:
        """``dtype`` is that of the angles handed out; they are always computed in float32."""
        super().__init__()
        frequencies, self.scale = ROPE_KINDS[rope.kind](rope)
        self.dtype = dtype
        self.register_buffer("frequencies", frequencies.to(device), persistent=False)

    def forward(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each [T, R]: both halves of R hold the same angles."""
        angles = torch.outer(positions_T.float(), self.frequencies)
        angles_TR = torch.cat((angles, angles), dim=-1)
        cos, sin = angles_TR.cos(), angles_TR.sin()
        if self.scale != 1.0:
            cos, sin = cos * self.scale, sin * self.scale
        return cos.to(self.dtype), sin.to(self.dtype)
