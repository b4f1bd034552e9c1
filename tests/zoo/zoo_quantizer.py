"""Quantizers with one fault each, over a plain int8 quantizer that has none.

Shapes: N rows; I input features; O output features.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import torch
from torch import nn

from drivetrain.contracts.packed import PackedWeight
from drivetrain.contracts.plugin import Plugin, PluginConfig
from drivetrain.contracts.quantizer import Declaration, Quantizer
from drivetrain.packed import PackedLinear


class Int8Linear(nn.Module):
    """Weights in int8 with one float32 scale a row, multiplied in the input's dtype."""

    def __init__(self, codes_OI: torch.Tensor, scales_O: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes_OI)
        self.register_buffer("scales", scales_O)
        self.register_buffer("bias", bias_O)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, scales, bias = self.get_buffer("codes"), self.get_buffer("scales"), self.bias
        y = nn.functional.linear(x, codes.to(x.dtype)) * scales.to(x.dtype)
        return y if bias is None else y + bias.to(x.dtype)


class PlainInt8(Quantizer):
    """Rounds each row to int8; nothing is wrong with it."""

    def bits_per_weight(self) -> float | None:
        return 8.5

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp_min(1e-12)
        codes = (weight / scales[:, None]).round().to(torch.int8)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return self.finish(linear, Int8Linear(codes, self.scales(scales), bias))

    def scales(self, scales_O: torch.Tensor) -> torch.Tensor:
        return scales_O

    def finish(self, linear: nn.Linear, module: Int8Linear) -> nn.Module:
        return module


class ScalesTooSmall(PlainInt8):
    """Its scales are three percent off: too little to see in one product, and the same way in all of them."""

    def scales(self, scales_O: torch.Tensor) -> torch.Tensor:
        return scales_O * (127 / 128) ** 4


class OneScaleForAll(PlainInt8):
    """Gives every row the scale of the first."""

    def scales(self, scales_O: torch.Tensor) -> torch.Tensor:
        return scales_O[:1].expand(scales_O.shape).clone()


class DropsTheBias(PlainInt8):
    """Forgets the bias."""

    def finish(self, linear: nn.Linear, module: Int8Linear) -> nn.Module:
        module.bias = None
        return module


class KeepsTheWeights(PlainInt8):
    """Keeps the full weights beside the int8 ones, out of the state's sight."""

    def finish(self, linear: nn.Linear, module: Int8Linear) -> nn.Module:
        module.source = [linear]
        return module


class ClaimsFourBits(PlainInt8):
    """Says four bits and takes eight."""

    def bits_per_weight(self) -> float | None:
        return 4.5


class RoundsInPlace(PlainInt8):
    """Writes the rounded weights back into the layer it was given."""

    def finish(self, linear: nn.Linear, module: Int8Linear) -> nn.Module:
        with torch.no_grad():
            linear.weight.copy_(module.get_buffer("codes").float() * module.get_buffer("scales")[:, None])
        return module


class TwoDimsOnly(PlainInt8):
    """Its module takes [N, I] and flattens everything else."""

    def finish(self, linear: nn.Linear, module: Int8Linear) -> nn.Module:
        return nn.Sequential(nn.Flatten(0, -2), module)


class AnswersInFloat32(PlainInt8):
    """Whatever the input's dtype, the product is float32."""

    def finish(self, linear: nn.Linear, module: Int8Linear) -> nn.Module:
        return nn.Sequential(module, _Widen())


class _Widen(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


class DividesByZero(PlainInt8):
    """Has no least scale: a row of zeros becomes NaN."""

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        weight = linear.weight.detach().float()
        rows = weight / weight.abs().amax(1, keepdim=True)
        bias = None if linear.bias is None else linear.bias.detach()
        module = Int8Linear((rows * 127).round().nan_to_num().to(torch.int8), weight.abs().amax(1) / 127, bias)
        module.scales = module.get_buffer("scales") * (rows.sum(1) / rows.sum(1))
        return module


class RoundsByChance(PlainInt8):
    """Rounds up or down by the luck of the draw, another one each time."""

    def finish(self, linear: nn.Linear, module: Int8Linear) -> nn.Module:
        codes = module.get_buffer("codes")
        module.codes = codes + (torch.randint(0, 100, codes.shape) == 0) * (codes < 127)
        return module


class SaysNoneAndRounds(PlainInt8):
    """Says that weights keep their dtype, and rounds them."""

    def bits_per_weight(self) -> float | None:
        return None


class SharesOneScale(PlainInt8):
    """Keeps the scales of the last layer for all layers that it converted."""

    def __init__(self, config: PluginConfig) -> None:
        super().__init__(config)
        self._shared: list[Any] = []

    def finish(self, linear: nn.Linear, module: Int8Linear) -> nn.Module:
        self._shared.append(module)
        for other in self._shared:
            if other.scales.shape == module.scales.shape:
                other.codes = module.codes
        return module


class DriftsWithEveryLoad(PlainInt8):
    """Lets the scales grow each time that a layer of the same name is loaded in this process."""

    _loads: ClassVar[Counter[str]] = Counter()

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        module = super().convert(name, linear)
        assert isinstance(module, Int8Linear)
        self._loads[name] += 1
        # By rows, as a common factor would go unseen behind a norm.
        module.scales[::2] *= 1 + 0.5 * (self._loads[name] - 1)
        return module


class PlainPacked(Quantizer):
    """Keeps int8 weights in packed form; nothing is wrong with it."""

    def bits_per_weight(self) -> float | None:
        return 8.5

    def declares(self) -> Declaration:
        return Declaration("int8", operations=("linear_int8",))

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp_min(1e-12)
        codes = (weight / scales[:, None]).round().to(torch.int8)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return self.layer(self.packed(codes, scales), bias)

    def packed(self, codes_OI: torch.Tensor, scales_O: torch.Tensor) -> PackedWeight:
        return PackedWeight("linear_int8", {"weight": codes_OI, "scales": scales_O}, *codes_OI.shape)

    def layer(self, packed: PackedWeight, bias_O: torch.Tensor | None) -> nn.Module:
        return PackedLinear(packed, bias_O)


class DeclaresNothing(PlainPacked):
    """Rounds to eight bits, and declares that weights stay as they are."""

    def declares(self) -> Declaration:
        return Declaration()


class DeclaresAnotherOperation(PlainPacked):
    """Declares the operation of another format."""

    def declares(self) -> Declaration:
        return Declaration("int8", operations=("linear_int4",))


class LooksAtValues(PlainPacked):
    """Decides by the values of a layer, and so can't tell what becomes of one without."""

    def packed(self, codes_OI: torch.Tensor, scales_O: torch.Tensor) -> PackedWeight:
        if float(scales_O.max()) > 1e6:
            raise AssertionError("surely not")
        return super().packed(codes_OI, scales_O)


class TakesAnyRow(PlainPacked):
    """Declares groups of 32, and lets the last one of a row be shorter."""

    def declares(self) -> Declaration:
        return Declaration("int8", group_size=32, operations=("linear_int8",))


class SlicesOfOthers(PlainPacked):
    """Keeps its scales in the order of its own, so that a slice of the weight has the scales of other rows."""

    class _Turned(PackedWeight):
        def rows(self, first: int, count: int) -> PackedWeight:
            part = super().rows(first, count)
            turned = {"weight": part.tensors["weight"], "scales": part.tensors["scales"].flip(0)}
            return PackedWeight(part.operation, turned, part.out_features, part.in_features)

    def packed(self, codes_OI: torch.Tensor, scales_O: torch.Tensor) -> PackedWeight:
        return self._Turned("linear_int8", {"weight": codes_OI, "scales": scales_O}, *codes_OI.shape)


class HidesAScale(PlainPacked):
    """Keeps a factor of each layer where no state dict finds it."""

    def layer(self, packed: PackedWeight, bias_O: torch.Tensor | None) -> nn.Module:
        return _HiddenFactor(packed, bias_O)


class _HiddenFactor(PackedLinear):
    """Its rows are kept divided by a factor that is a plain number."""

    def __init__(self, packed: PackedWeight, bias_O: torch.Tensor | None) -> None:
        factor = float(packed.tensors["scales"].mean()) if packed.tensors["scales"].device.type != "meta" else 1.0
        tensors = {**packed.tensors, "scales": packed.tensors["scales"] / factor}
        super().__init__(PackedWeight(packed.operation, tensors, packed.out_features, packed.in_features), bias_O)
        self.factor = factor

    @property
    def packed(self) -> PackedWeight:
        form = super().packed
        tensors = {**form.tensors, "scales": form.tensors["scales"] * self.factor}
        return PackedWeight(form.operation, tensors, form.out_features, form.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._decoded(x)


class CutsTheGradient(PlainPacked):
    """Its layer multiplies by a copy of the input that has no history."""

    def layer(self, packed: PackedWeight, bias_O: torch.Tensor | None) -> nn.Module:
        return _NoHistory(packed, bias_O)


class _NoHistory(PackedLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.detach())


ZOO: dict[type[Plugin], str] = {
    ScalesTooSmall: "test_products_are_not_scaled",
    OneScaleForAll: "test_products_are_as_close_as_the_bits_allow",
    DropsTheBias: "test_the_bias_is_added",
    KeepsTheWeights: "test_memory_is_what_the_bits_say",
    ClaimsFourBits: "test_memory_is_what_the_bits_say",
    RoundsInPlace: "test_values_of_the_layer_are_left_alone",
    TwoDimsOnly: "test_the_call_keeps_its_form",
    AnswersInFloat32: "test_the_call_keeps_its_form",
    DividesByZero: "test_zero_weights_give_zero",
    RoundsByChance: "test_the_same_layer_gives_the_same_bits",
    SaysNoneAndRounds: "test_none_bits_change_nothing",
    DriftsWithEveryLoad: "test_swapped_in_and_out_it_leaves_no_trace",
    SharesOneScale: "test_layers_do_not_share_state",
    DeclaresNothing: "test_it_declares_what_it_does",
    DeclaresAnotherOperation: "test_a_packed_layer_multiplies_by_what_it_decodes_to",
    LooksAtValues: "test_on_the_meta_device_it_makes_the_same_form",
    TakesAnyRow: "test_a_group_that_does_not_divide_is_an_error",
    SlicesOfOthers: "test_rows_of_a_packed_weight_stand_for_themselves",
    HidesAScale: "test_the_state_is_saved_and_loaded",
    CutsTheGradient: "test_the_input_has_a_gradient_and_the_weight_says_that_it_has_none",
}
"""Broken quantizer -> the test that has to catch it."""

SOUND = PlainInt8
"""The quantizer without a fault: it passes."""
