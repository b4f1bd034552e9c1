"""What a quantizer has to do: the same call with the same form, an error that its bits explain, and no hidden memory.

Shapes: N rows; I input features; O output features.

A quantizer may claim ``batch_invariant``: a row's product is the same to the last bit whatever other rows there are.
Layers that keep a packed weight (``drivetrain.packed.PackedLinear``) are examined as such: what they stand for, their
rows, their bits, and the operation that multiplies by them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from drivetrain.binding import KernelBinder
from drivetrain.contracts.kernels import KernelProvider
from drivetrain.contracts.quantizer import FULL, Quantizer
from drivetrain.errors import DrivetrainError
from drivetrain.packed import PackedLinear, bind_packed, decode
from drivetrain.registry import Registry, load
from drivetrain.testing.live import answers, live_engine, there_and_back
from drivetrain.testing.measure import tensor_bytes
from drivetrain.testing.places import DeviceSuite

ERROR_BOUNDS: Mapping[int, float] = {16: 0.01, 8: 0.06, 6: 0.12, 5: 0.18, 4: 0.3, 3: 0.5, 2: 0.8, 1: 1.0}
"""Bits of a weight, rounded down -> the most that a product of normally distributed weights and inputs may be off, as a
share of its norm. Symmetric rounding with one scale a row of normal weights has about 2.3 / 2**bits; what is over
allows for formats with an exponent and for quantized inputs."""

NAME = "model.layers.0.mlp.up_proj"
"""What the tested layer is called: a name that no quantizer has a reason to leave out."""

NAMES = (NAME, "model.layers.0.self_attn.q_proj", "model.layers.17.mlp.down_proj", "lm_head")

SHAPES = ((64, 48), (37, 23), (1, 1), (33, 256), (160, 1), (512, 512))
"""I and O of the layers under test; none but the last is a multiple of what a kernel would like."""


def error_bound(bits: float | None) -> float:
    """The published bound on the relative error of a product; 0 when weights keep their dtype."""
    if bits is None:
        return 0.0
    return next(bound for floor, bound in ERROR_BOUNDS.items() if bits >= floor or floor == 1)


def reference_binder() -> KernelBinder:
    """Binds every operation to the reference."""
    plugin = load(Registry().find("kernels", "reference"))
    return KernelBinder([("reference", cast(KernelProvider, plugin(plugin.Config())))])


def rounding_of(dtype: torch.dtype) -> float:
    """What the dtype of the activations itself may add to a product's relative error."""
    return 4 * torch.finfo(dtype).eps


class QuantizerSuite(DeviceSuite):
    """The examination of a quantizer."""

    kind = "quantizer"

    # --- what the tests use ------------------------------------------------------------------------------------------

    @classmethod
    def linear(
        cls, shape: tuple[int, int] | None = None, *, bias: bool = True, dtype: str = "float32", seed: int = 0
    ) -> nn.Linear:
        """A loaded layer on the device, normal weights with a variance of 1 / I; skips unless the dtype is claimed."""
        torch_dtype = cls.require_dtype(dtype)
        generator = torch.Generator().manual_seed(seed)
        shape = shape or (cls.inputs(), 48)
        layer = nn.Linear(*shape, bias=bias)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(shape[0]))
        return layer.to(cls.place().device, torch_dtype).eval()

    @classmethod
    def group(cls) -> int | None:
        """How many weights of a row share a scale; None for whole rows."""
        quantizer: Quantizer = cls.make()
        return quantizer.declares().group_size

    @classmethod
    def inputs(cls) -> int:
        """Inputs of the usual layer: 64, or a group where that is larger."""
        return max(64, cls.group() or 1)

    @classmethod
    def shapes(cls) -> list[tuple[int, int]]:
        """I and O of the layers under test whose rows are whole groups."""
        return [(cls.inputs(), 48), *(shape for shape in SHAPES if shape[0] % (cls.group() or 1) == 0)]

    @classmethod
    def require_fit(cls, shape: tuple[int, int]) -> None:
        """Skip the test unless the layer's rows are whole groups."""
        group = cls.group()
        if group is not None and shape[0] % group:
            pytest.skip(f"not claimed: rows of {shape[0]} are no whole groups of {group}")

    @classmethod
    def packed_layer(cls, linear: nn.Linear) -> PackedLinear:
        """The converted layer; skips the test unless it keeps a packed weight."""
        module = cls.converted(linear)
        if not isinstance(module, PackedLinear):
            pytest.skip(f"not claimed: the layer is a {type(module).__name__}, no PackedLinear")
        return module

    @classmethod
    def rows(cls, *shape: int, dtype: str = "float32", seed: int = 1) -> torch.Tensor:
        """Normally distributed inputs on the device."""
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return x.to(cls.place().device, getattr(torch, dtype))

    @classmethod
    def converted(cls, linear: nn.Linear, name: str = NAME) -> nn.Module:
        """What the quantizer makes of ``linear``, whose values must stay for the comparison."""
        quantizer: Quantizer = cls.make()
        module = quantizer.convert(name, copy.deepcopy(linear))
        assert isinstance(module, nn.Module), f"convert returned a {type(module).__name__}, not a module"
        return module.eval()

    @classmethod
    def require_bits(cls) -> float:
        """Bits of a weight; skips the test when weights keep their dtype."""
        quantizer: Quantizer = cls.make()
        bits = quantizer.bits_per_weight()
        if bits is None:
            pytest.skip("not claimed: bits_per_weight is None, weights keep their dtype")
        return bits

    @classmethod
    def require_full_weights(cls) -> None:
        """Skip the test unless the quantizer declares that it starts from full weights, as the tiny model has them."""
        quantizer: Quantizer = cls.make()
        starts_from = quantizer.declares().starts_from
        if FULL not in starts_from:
            pytest.skip(f"not claimed: it starts from {', '.join(sorted(starts_from))}, not from full weights")

    @classmethod
    def bound(cls, dtype: torch.dtype) -> float:
        """Relative error allowed to a product in ``dtype``."""
        quantizer: Quantizer = cls.make()
        return error_bound(quantizer.bits_per_weight()) + rounding_of(dtype)

    # --- what it says of itself --------------------------------------------------------------------------------------

    def test_bits_are_told(self) -> None:
        """``bits_per_weight`` is None or a number from 1 to 32, the same every time."""
        quantizer: Quantizer = self.make()
        bits = quantizer.bits_per_weight()
        assert bits == quantizer.bits_per_weight() == self.make().bits_per_weight()
        assert bits is None or (math.isfinite(bits) and 1 <= bits <= 32), f"{bits} bits a weight"

    def test_it_declares_what_it_does(self) -> None:
        """The declaration is the same every time, and tells of weights exactly where there are bits; one that takes
        weights as they are stored may tell of them without bits, which its files decide."""
        quantizer: Quantizer = self.make()
        declared = quantizer.declares()
        assert declared == quantizer.declares() == self.make().declares()
        says, has = declared.weights is not None, quantizer.bits_per_weight() is not None
        told = f"bits_per_weight is {quantizer.bits_per_weight()}, declared are weights {declared.weights}"
        assert says or not has, told
        assert has or not says or FULL not in declared.starts_from, told
        assert declared.group_size is None or declared.group_size > 0, f"groups of {declared.group_size}"

    def test_a_group_that_does_not_divide_is_an_error(self) -> None:
        """Rows that are no whole groups raise an error that names the layer, its inputs and the group."""
        group = self.group()
        if group is None or group < 2:
            pytest.skip("not claimed: no groups")
        width = 2 * group + group // 2
        quantizer: Quantizer = self.make()
        with pytest.raises(DrivetrainError) as caught:
            quantizer.convert(NAME, self.linear((width, 8)))
        for wanted in (NAME, str(width), str(group)):
            assert wanted in str(caught.value), f"the error does not name {wanted}: {caught.value}"

    def test_none_bits_change_nothing(self) -> None:
        """Where weights keep their dtype, products are equal to the last bit."""
        if self.make().bits_per_weight() is not None:
            pytest.skip("not claimed: weights are quantized")
        for shape in self.shapes():
            linear, x = self.linear(shape), self.rows(5, shape[0])
            assert torch.equal(self.converted(linear)(x), linear(x))

    def test_layers_are_quantized(self) -> None:
        """With bits, an ordinary layer of ordinary size does not come back as it was."""
        self.require_bits()
        linear = self.linear((512, 512))
        quantizer: Quantizer = self.make()
        assert quantizer.convert(NAME, linear) is not linear, f"{NAME} of 512 x 512 is left as it is"

    # --- the form of the call ----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
    def test_the_call_keeps_its_form(self, shape: tuple[int, int], dtype: str) -> None:
        """[..., I] to [..., O] in the input's dtype on its device, for no row, one row, many, and more dims."""
        self.require_fit(shape)
        module = self.converted(self.linear(shape, dtype=dtype))
        with torch.inference_mode():
            for leading in ((), (1,), (0,), (7,), (2, 3), (2, 0), (1, 1, 1)):
                x = self.rows(*leading, shape[0], dtype=dtype)
                y = module(x)
                assert y.shape == (*leading, shape[1]), f"{tuple(x.shape)} became {tuple(y.shape)}"
                assert y.dtype == x.dtype, f"{x.dtype} became {y.dtype}"
                assert y.device == x.device, f"from {x.device} to {y.device}"

    def test_state_is_on_the_device(self) -> None:
        """Everything the module keeps is where the layer was, and nothing is left on the meta device."""
        linear = self.linear()
        kept = self.converted(linear).state_dict().values()
        places = {value.device for value in kept if isinstance(value, torch.Tensor)}
        assert places <= {linear.weight.device}, f"state on {places}, the layer was on {linear.weight.device}"

    def test_input_rows_may_be_a_view(self) -> None:
        """Every other row of a wider tensor gives what its copy gives."""
        module, wide = self.converted(self.linear()), self.rows(8, self.inputs() + 36)
        view = wide[::2, 20:-16]
        with torch.inference_mode():
            found, wanted = module(view), module(view.contiguous())
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

    def test_inputs_are_left_alone(self) -> None:
        """The call does not write to its input."""
        module, x = self.converted(self.linear()), self.rows(5, self.inputs())
        before = x.clone()
        with torch.inference_mode():
            module(x)
        assert torch.equal(x, before)

    def test_training_mode_changes_nothing(self) -> None:
        """The module gives the same in eval and train mode, with and without gradients being recorded."""
        module, x = self.converted(self.linear()), self.rows(5, self.inputs())
        wanted = module(x).detach()
        module.train()
        assert torch.equal(module(x).detach(), wanted)
        module.eval()
        with torch.no_grad():
            assert torch.equal(module(x), wanted)

    # --- numbers -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
    def test_products_are_as_close_as_the_bits_allow(self, shape: tuple[int, int], dtype: str) -> None:
        """The error of a product, as a share of its norm, is within the published bound; with and without a bias."""
        self.require_fit(shape)
        for bias in (True, False):
            linear, x = self.linear(shape, bias=bias, dtype=dtype), self.rows(64, shape[0], dtype=dtype)
            with torch.inference_mode():
                found, wanted = self.converted(linear)(x).double(), linear(x).double()
            error = float((found - wanted).norm() / wanted.norm())
            bound = self.bound(x.dtype)
            assert error <= bound, f"off by {error:.3g} of the norm, allowed is {bound:.3g} (bias: {bias})"

    def test_one_row_is_as_good_as_many(self) -> None:
        """A single row, as in decoding, is multiplied as exactly as a batch."""
        linear, x = self.linear((512, 512)), self.rows(16, 512)
        module = self.converted(linear)
        with torch.inference_mode():
            found = torch.cat([module(row) for row in x.split(1)]).double()
            wanted = linear(x).double()
        error = float((found - wanted).norm() / wanted.norm())
        assert error <= self.bound(x.dtype), f"row by row it is off by {error:.3g} of the norm"

    def test_products_are_not_scaled(self) -> None:
        """Rounding goes both ways: over many products, output by output, no factor of its own is left."""
        linear, x = self.linear((512, 64), bias=False), self.rows(512, 512)
        with torch.inference_mode():
            found, wanted = self.converted(linear)(x).double(), linear(x).double()
        factors_O = (found * wanted).sum(0) / wanted.square().sum(0)
        # An unbiased error of e over N products leaves about e / sqrt(N); clipping shrinks by about e**2.
        bound = self.bound(x.dtype)
        allowed = bound**2 + 5 * bound / math.sqrt(x.shape[0])
        worst = float((factors_O - 1).abs().max())
        assert worst <= allowed, f"an output's factor is {worst:.3g} away from 1, allowed is {allowed:.3g}"

    def test_the_bias_is_added(self) -> None:
        """Without any input, what comes out is the bias."""
        for shape in self.shapes():
            linear, x = self.linear(shape), self.rows(3, shape[0]) * 0
            with torch.inference_mode():
                found = self.converted(linear)(x)
            torch.testing.assert_close(found, linear.bias.expand(3, -1), rtol=1e-2, atol=1e-6)

    def test_zero_weights_give_zero(self) -> None:
        """A layer, or a row, of zeros has no scale to divide by, and still gives zeros."""
        for rows in (slice(None), slice(0, 3)):
            linear = self.linear(bias=False)
            with torch.no_grad():
                linear.weight[rows] = 0
            with torch.inference_mode():
                found = self.converted(linear)(self.rows(4, self.inputs()))
            assert torch.isfinite(found).all(), "the output has an infinity or a NaN"
            assert not found[:, rows].any(), "zero weights give something"

    def test_an_outlier_stays_finite(self) -> None:
        """One weight a thousand times larger than all others, and one such input, give finite products."""
        linear, x = self.linear(), self.rows(4, self.inputs())
        with torch.no_grad():
            linear.weight[5, 7] = 1000.0
            x[1, 3] = 1000.0
        with torch.inference_mode():
            assert torch.isfinite(self.converted(linear)(x)).all(), "the output has an infinity or a NaN"

    def test_the_same_layer_gives_the_same_bits(self) -> None:
        """Converted twice, called twice: equal to the last bit."""
        linear, x = self.linear((512, 512)), self.rows(9, 512)
        first, second = self.converted(linear), self.converted(linear)
        with torch.inference_mode():
            wanted = first(x)
            assert torch.equal(first(x), wanted), "called again, it gives other bits"
            assert torch.equal(second(x), wanted), "converted again, it gives other bits"

    def test_a_row_does_not_feel_the_others(self) -> None:
        """Where batch invariance is claimed, a row alone and in company gives the same bits."""
        self.require_claim("batch_invariant")
        module, x = self.converted(self.linear((512, 512))), self.rows(33, 512)
        with torch.inference_mode():
            together = module(x)
            for count in (1, 2, 16):
                assert torch.equal(module(x[:count]), together[:count]), f"{count} rows alone give other bits"

    # --- memory and manners of converting ----------------------------------------------------------------------------

    def test_memory_is_what_the_bits_say(self) -> None:
        """A converted layer keeps at most ``bits_per_weight`` bits a weight, its bias, and 5 percent."""
        bits = self.require_bits()
        linear = self.linear((1024, 768))
        kept = tensor_bytes(self.converted(linear))
        assert linear.bias is not None
        allowed = linear.weight.numel() * bits / 8 * 1.05 + linear.bias.numel() * 4 + 4096
        assert kept <= allowed, f"it keeps {8 * kept / linear.weight.numel():.2f} bits a weight and claims {bits}"

    def test_values_of_the_layer_are_left_alone(self) -> None:
        """Converting does not write to the weights it is given: somebody else may hold them too."""
        for name in NAMES:
            linear = self.linear()
            weight, bias = linear.weight, linear.bias
            before = weight.detach().clone(), bias.detach().clone()
            quantizer: Quantizer = self.make()
            quantizer.convert(name, linear)
            assert torch.equal(weight, before[0]), f"{name}: the weights were written to"
            assert torch.equal(bias, before[1]), f"{name}: the bias was written to"

    def test_what_it_leaves_out_is_returned_itself(self) -> None:
        """A layer comes back as the very module it was, untouched, or as another one: never as a changed self."""
        x = self.rows(3, self.inputs())
        for name in NAMES:
            linear = self.linear()
            wanted = linear(x).detach()
            quantizer: Quantizer = self.make()
            if quantizer.convert(name, linear) is linear:
                assert type(linear) is nn.Linear, f"{name}: the layer itself was given another class"
                assert torch.equal(linear(x).detach(), wanted), f"{name}: the layer itself gives something else now"

    def test_layers_do_not_share_state(self) -> None:
        """One quantizer converts layer after layer; each keeps its own weights."""
        quantizer: Quantizer = self.make()
        layers = [self.linear(seed=seed) for seed in range(3)]
        modules = [quantizer.convert(name, copy.deepcopy(x)) for name, x in zip(NAMES, layers, strict=False)]
        x = self.rows(8, self.inputs())
        for index, (linear, module) in enumerate(zip(layers, modules, strict=True)):
            with torch.inference_mode():
                found, wanted = module.eval()(x).double(), linear(x).double()
            error = float((found - wanted).norm() / wanted.norm())
            assert error <= self.bound(x.dtype), f"layer {index} of 3 is off by {error:.3g} of the norm"

    def test_on_the_meta_device_it_makes_the_same_form(self) -> None:
        """A layer without values becomes one with the same tensors in shape and dtype: its bytes are known before."""
        self.require_bits()
        linear = self.linear()
        made = self.converted(linear).state_dict()
        quantizer: Quantizer = self.make()
        planned = quantizer.convert(NAME, copy.deepcopy(linear).to("meta")).state_dict()
        forms = [
            {name: (tuple(value.shape), value.dtype) for name, value in state.items()} for state in (planned, made)
        ]
        assert forms[0] == forms[1], f"on the meta device {forms[0]}, with values {forms[1]}"

    # --- packed layers -----------------------------------------------------------------------------------------------

    def test_a_packed_layer_multiplies_by_what_it_decodes_to(self) -> None:
        """With the reference of its operation bound to it, and without: the product is that of the decoded weight."""
        linear, x = self.linear((512, 96)), self.rows(7, 512)
        layer = self.packed_layer(linear)
        quantizer: Quantizer = self.make()
        declared = quantizer.declares()
        form = layer.packed
        assert form.operation in declared.operations, f"{form.operation} is not in {declared.operations}"
        with torch.inference_mode():
            wanted = nn.functional.linear(x, decode(form), linear.bias).double()
        # Activations that are rounded have an error of their own.
        allowed = 1e-5 if declared.activations is None else self.bound(x.dtype)
        for bound in (False, True):
            if bound:
                bind_packed(nn.ModuleList([layer]), reference_binder().bind, x.dtype)
            with torch.inference_mode():
                found = layer(x).double()
            error = float((found - wanted).norm() / wanted.norm())
            assert error <= allowed, f"bound: {bound}, off by {error:.3g} of the norm, allowed is {allowed:.3g}"

    def test_rows_of_a_packed_weight_stand_for_themselves(self) -> None:
        """A slice of outputs, and some outputs by number, decode to those rows of the whole."""
        packed = self.packed_layer(self.linear((512, 96))).packed
        whole_OI = decode(packed)
        assert whole_OI.shape == (96, 512)
        ids = torch.tensor([5, 0, 95, 5], device=whole_OI.device)
        assert torch.equal(decode(packed.rows(7, 20)), whole_OI[7:27]), "rows 7 .. 26 are others"
        assert torch.equal(decode(packed.at(ids)), whole_OI[ids]), "outputs 5, 0, 95, 5 are others"

    def test_bits_of_a_packed_weight_are_those_claimed(self) -> None:
        """A packed weight takes the bits that are claimed; less where scales are of whole rows, and those are long."""
        bits = self.require_bits()
        packed = self.packed_layer(self.linear((1024, 768), bias=False)).packed
        found = packed.bits_per_weight
        if self.group() is not None:
            assert found == pytest.approx(bits, abs=1e-3), f"{found:.3f} bits a weight, claimed are {bits}"
        assert bits - 1 < found <= bits + 1e-6, f"{found:.3f} bits a weight, claimed are {bits}"

    def test_the_state_is_saved_and_loaded(self) -> None:
        """A layer that loads another one's state gives what the other gives."""
        first, second = (self.converted(self.linear(seed=seed)) for seed in (0, 1))
        x = self.rows(5, self.inputs())
        assert not torch.equal(first(x), second(x))
        second.load_state_dict(first.state_dict())
        assert torch.equal(second(x), first(x)), "something of the layer is not in its state"

    def test_the_input_has_a_gradient_and_the_weight_says_that_it_has_none(self) -> None:
        """The gradient of the input is that of the full layer as far as the bits allow, or is refused with a
        DrivetrainError; packed weights refuse theirs with one."""
        self.require_bits()
        linear, x = self.linear(), self.rows(9, self.inputs()).requires_grad_()
        module, upstream = self.converted(linear), self.rows(9, 48, seed=2)
        if isinstance(module, PackedLinear):
            with pytest.raises(DrivetrainError, match="gradient"):
                module.requires_grad_()
            bind_packed(nn.ModuleList([module]), reference_binder().bind, x.dtype)
        (wanted,) = torch.autograd.grad(linear(x), x, upstream)
        try:
            (found,) = torch.autograd.grad(module(x), x, upstream)
        except DrivetrainError:
            return
        error = float((found - wanted).norm() / wanted.norm())
        assert error <= self.bound(x.dtype), f"the gradient is off by {error:.3g} of its norm"

    # --- in a running engine -----------------------------------------------------------------------------------------

    def test_swapped_in_and_out_it_leaves_no_trace(self, tmp_path: Path) -> None:
        """In a running engine on a tiny model, with a request in flight: swapped in and back to ``none``, twice. Each
        time it is in, answers are the same, and those of ``none`` if weights keep their dtype; once it is out, they are
        what they were before."""
        self.require_dtype("float32")
        self.require_full_weights()
        ref = self.ref()
        part = {"name": ref.qualified, **self.options}
        with live_engine(tmp_path, self.place(), ref, width=self.group()) as llm:
            undisturbed = answers(llm)
            first, afterwards = there_and_back(llm, "quantizer", part, "none")
            assert afterwards == undisturbed, "swapped out again, it has left other answers behind"
            second, afterwards = there_and_back(llm, "quantizer", part, "none")
            assert afterwards == undisturbed, "swapped out a second time, it has left other answers behind"
        assert second == first, "swapped in a second time, it gives other answers"
        if self.make().bits_per_weight() is None:
            assert first == undisturbed, "weights keep their dtype, and yet it gives other answers"
