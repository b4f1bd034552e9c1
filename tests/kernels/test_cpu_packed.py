"""Rules of the C++ products with packed weights: every format at every number of rows and vector width, alone and in a
step, with dense layers beside them; what does not fit is refused with its numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from drivetrain.contracts.kernels import OPERATIONS, KernelSpec
from drivetrain.contracts.packed import PackedWeight
from drivetrain.errors import ConfigError
from drivetrain.kernels.cpu import CpuKernels
from drivetrain.kernels.cpu.library import VARIANTS
from drivetrain.kernels.reference import ReferenceKernels
from drivetrain.packed import DECODERS, PackedLinear, bind_packed
from drivetrain.packed.gguf import BLOCK_TYPES
from drivetrain.plugins.attention.paged_cpu import PagedCpuAttention
from drivetrain.plugins.attention.sdpa import SdpaAttention
from drivetrain.testing.kernel_oracle import Case
from kernels.test_cpu_kernels import HERE, REFERENCE, STEPS, build, calls_of, ends, provider, scores
from support.tiny_models import FolderCheckpoint, tiny_configs, tiny_model

torch.set_num_threads(1)

USES = [
    (operation, number)
    for operation in DECODERS
    for number in (BLOCK_TYPES if operation.startswith("linear_gguf") else (0,))
]
EACH_USE = pytest.mark.parametrize(("operation", "number"), USES)


def names_of(operation: str) -> list[str]:
    return list(OPERATIONS[operation].arguments)[1:-1]


def use(operation: str, number: int, rows: int, inner: int, outer: int, group: int = 32, bias: bool = True) -> Case:
    """A case of any size: the shapes of its weights are read off the signature."""
    params = (
        {"type": float(number)}
        if number
        else {"group": float(group)}
        if "int4" in operation or "int3" in operation
        else {}
    )
    sizes = {"I": inner, "O": outer}
    shapes: list[tuple[int, ...] | None] = [(rows, inner)]
    for name, shape in list(OPERATIONS[operation].arguments.items())[1:-1]:
        if name == "blocks":
            shapes.append((outer, BLOCK_TYPES[number].row_bytes(inner)))
            continue
        dims: list[int] = []
        for dim in filter(None, shape.split(", ")):
            size, _, divisor = dim.partition(" / ")
            dims.append(sizes[size] // (int(params[divisor] if divisor.isalpha() else divisor) if divisor else 1))
        shapes.append(tuple(dims))
    return Case(operation, (*shapes, (outer,) if bias else None), sizes, params)


def compare(case: Case, variant: str, dtype: str = "float32") -> None:
    inputs = case.inputs(getattr(torch, dtype), "cpu", seed=3)
    wanted = REFERENCE.make(case.spec("cpu", dtype))(*inputs)
    found = provider(variant).make(case.spec("cpu", dtype))(*inputs)
    relative, absolute = OPERATIONS[case.operation].tolerance[dtype]
    torch.testing.assert_close(found, wanted, rtol=relative, atol=absolute * 3, msg=lambda text: f"{case}: {text}")


# --- single products -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", HERE)
@EACH_USE
def test_products_of_every_number_of_rows(variant: str, operation: str, number: int) -> None:
    """Few rows and many; outputs that fill no chunk; more scales in a row than are made ready at a time."""
    for rows in (1, 2, 3, 4, 5, 33):
        compare(use(operation, number, rows, 256, 49), variant)
    for rows in (1, 4, 9):
        compare(use(operation, number, rows, 2304, 5), variant)
        compare(use(operation, number, rows, 512, 40, bias=False), variant, "bfloat16")


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize(("operation", "number"), [use for use in USES if use[0].endswith("_a8")])
def test_many_rounded_rows_by_weights_in_groups(variant: str, operation: str, number: int) -> None:
    """One panel of tokens to four, the last of one token or full; chunks of outputs that end anywhere, and that are
    cut short because rows are long; more scales in a row than are made ready at a time."""
    for rows in (13, 16, 19, 25, 32, 48, 49, 65):
        compare(use(operation, number, rows, 256, 50), variant)
    compare(use(operation, number, 21, 2304, 7), variant)
    compare(use(operation, number, 20, 8192, 35, bias=False), variant)
    compare(use(operation, number, 40, 512, 51), variant, "bfloat16")


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize("operation", ["linear_int4", "linear_int4_a8", "linear_int3"])
@pytest.mark.parametrize("group", [8, 24, 32, 64, 96, 128, 384, 3456])
def test_groups_of_any_size(variant: str, operation: str, group: int) -> None:
    """Those that are no whole vectors, and those that begin in the middle of what is made ready at a time."""
    for rows in (1, 3, 7, 26):
        compare(use(operation, 0, rows, 3456, 9, group), variant)


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize("operation", ["linear_int8", "linear_w8a8", "linear_fp8", "linear_fp8a8"])
def test_inputs_that_fill_no_vector(variant: str, operation: str) -> None:
    for rows in (1, 4, 6):
        for inner in (1, 7, 31, 33, 65, 129, 200):
            compare(use(operation, 0, rows, inner, 11), variant)


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize(("operation", "number"), [use for use in USES if "int4" in use[0] or 0 < use[1] < 12])
def test_rows_that_end_within_a_step(variant: str, operation: str, number: int) -> None:
    """One to three atoms of four, alone and behind whole steps and runs of steps."""
    for inner in (32, 64, 96, 128, 160, 576, 736):
        for rows in (3, 25):
            compare(use(operation, number, rows, inner, 5), variant)


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize(("operation", "number"), [use for use in USES if "int4" in use[0] or "gguf" in use[0]])
def test_bits_of_a_row_do_not_depend_on_the_rows_beside_it(variant: str, operation: str, number: int) -> None:
    case = use(operation, number, 4, 512, 37)
    x, *weights = case.inputs(torch.float32, "cpu")
    assert x is not None
    linear = provider(variant).make(case.spec("cpu", "float32"))
    alone = torch.cat([linear(row, *weights) for row in x.split(1)])
    for rows in (2, 3, 4):
        assert torch.equal(linear(x[:rows], *weights), alone[:rows])


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize("number", BLOCK_TYPES)
def test_the_largest_codes_and_activations_do_not_overflow(variant: str, number: int) -> None:
    kind = BLOCK_TYPES[number]
    case = use("linear_gguf", number, 2, 512, 3, bias=False)
    _, blocks, _ = case.inputs(torch.float32, "cpu")
    assert blocks is not None
    codes = blocks.unflatten(1, (-1, kind.row_bytes(kind.size)))
    first, last = {2: (2, 18), 3: (4, 20), 6: (2, 22), 7: (4, 24), 8: (2, 34), 14: (0, 192)}.get(number, (16, None))
    codes[:, :, first:last] = 128 if number == 8 else 255
    x = torch.tensor([[0.37], [-0.37]]).expand(2, 512).contiguous()
    wanted = x.double() @ DECODERS["linear_gguf"](blocks, torch.float64, case.params).T
    found = provider(variant).make(case.spec("cpu", "float32"))(x, blocks, None)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-6 * float(wanted.abs().max()))
    rounded = replace(case, operation="linear_gguf_a8").spec("cpu", "float32")
    found = provider(variant).make(rounded)(x.repeat(20, 1), blocks, None)
    torch.testing.assert_close(found.double(), wanted.repeat(20, 1), rtol=5e-6, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("operation", ["linear_int8", "linear_int4", "linear_int4_a8", "linear_int3", "linear_w8a8"])
def test_scales_of_any_floating_dtype_are_read(operation: str, dtype: torch.dtype) -> None:
    case = use(operation, 0, 2, 128, 20)
    inputs = [
        value.to(dtype) if name in ("scales", "mins") and value is not None else value
        for name, value in zip(OPERATIONS[operation].arguments, case.inputs(torch.float32, "cpu"), strict=True)
    ]
    spec = case.spec("cpu", "float32")
    torch.testing.assert_close(provider().make(spec)(*inputs), REFERENCE.make(spec)(*inputs), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize("group", [32, 64, 128, 256, 640])
def test_groups_with_half_scales_and_rounded_activations(variant: str, group: int) -> None:
    """Rows that end in the middle of a vector of scales, and more of them than are widened at a time."""
    for rows, inner in ((1, 640), (3, 3840), (20, 1280)):
        if inner % group:
            continue
        case = use("linear_int4_a8", 0, rows, inner, 7, group)
        x, weight, scales, mins, bias = case.inputs(torch.float32, "cpu")
        assert scales is not None
        assert mins is not None
        inputs = (x, weight, scales.half(), mins.half(), bias)
        spec = case.spec("cpu", "float32")
        wanted = REFERENCE.make(spec)(*inputs)
        torch.testing.assert_close(provider(variant).make(spec)(*inputs), wanted, rtol=1e-5, atol=3e-4)


@pytest.mark.parametrize("variant", HERE)
@pytest.mark.parametrize("operation", ["linear_int4", "linear_int4_a8", "linear_int3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_points_are_minima_in_whole_scales(variant: str, operation: str, dtype: torch.dtype) -> None:
    """A byte each, whatever the scales are kept in; groups of any size, and rows that end within a vector of them."""
    for group, inner in ((8, 96), (24, 96), (32, 640), (64, 640), (96, 960), (128, 1280), (640, 1280)):
        for rows in (1, 3, 26):
            case = use(operation, 0, rows, inner, 7, group)
            case = replace(case, params={**case.params, "zero_points": 1.0})
            named = zip(OPERATIONS[operation].arguments, case.inputs(torch.float32, "cpu"), strict=True)
            inputs = [value.to(dtype) if name == "scales" and value is not None else value for name, value in named]
            assert [value.dtype for value in inputs if value is not None].count(torch.uint8) >= 2
            spec = case.spec("cpu", "float32")
            found, wanted = (by.make(spec)(*inputs) for by in (provider(variant), REFERENCE))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=3e-4)


@pytest.mark.parametrize("variant", HERE)
def test_every_float8_number_is_read_exactly(variant: str) -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(256, 1)
    wanted = weight.float()[:, 0]
    for inner in (1, 16):
        for rows in (1, 6):
            x = torch.zeros(rows, inner)
            x[:, 0] = 1.0
            wide = torch.zeros(256, inner, dtype=torch.uint8).view(torch.float8_e4m3fn)
            wide[:, :1] = weight
            spec = KernelSpec("linear_fp8", "cpu", "float32", {"I": inner, "O": 256})
            found = provider(variant).make(spec)(x, wide, torch.ones(256), None)
            for row in found:
                assert torch.equal(row.isnan(), wanted.isnan())
                assert torch.equal(row.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize(
    ("operation", "number"),
    [(name, 0) for name in ("linear_int8", "linear_int4", "linear_int4_a8", "linear_w8a8", "linear_fp8a8")]
    + [(name, number) for name in ("linear_gguf", "linear_gguf_a8") for number in (3, 8, 12)],
)
def test_not_a_number_stays_one_and_in_its_row(operation: str, number: int) -> None:
    case = use(operation, number, 30, 256 if number else 96, 20)
    for rows in (3, 6, 30):
        x, *weights = case.inputs(torch.float32, "cpu")
        assert x is not None
        x = x[:rows].clone()
        x[1, 50] = float("nan")
        found = provider().make(case.spec("cpu", "float32"))(x, *weights)
        assert found[1].isnan().all()
        assert found[[0, *range(2, rows)]].isfinite().all()


def test_the_largest_integers_do_not_overflow() -> None:
    """-128 by 127, as often as a row of a large model has inputs."""
    for variant in HERE:
        for rows in (1, 8):
            weight = torch.full((4, 8192), -128, dtype=torch.int8)
            x = torch.full((rows, 8192), 127.0)
            x[:, ::2] = -127.0
            weight[:, ::2] = 127
            found = provider(variant).make(KernelSpec("linear_w8a8", "cpu", "float32"))(x, weight, torch.ones(4), None)
            assert torch.equal(found, torch.full((rows, 4), -127.0 * (127 + 128) * 4096))


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (KernelSpec("linear_int4", "cpu", "float32", {"I": 100, "O": 8}, {"group": 64.0}), "100"),
        (KernelSpec("linear_int4", "cpu", "float32", {"I": 33, "O": 8}, {"group": 33.0}), "33"),
        (KernelSpec("linear_int4_a8", "cpu", "float32", {"I": 48, "O": 8}, {"group": 16.0}), "48"),
        (KernelSpec("linear_int3", "cpu", "float32", {"I": 36, "O": 8}, {"group": 12.0}), "36"),
        (KernelSpec("linear_int4", "cpu", "float32", {"I": 64, "O": 8}, {"group": 0.0}), "0"),
        (KernelSpec("linear_gguf", "cpu", "float32", {"I": 100, "O": 8}, {"type": 8.0}), "100"),
        (KernelSpec("linear_gguf", "cpu", "float32", {"I": 576, "O": 8}, {"type": 12.0}), "576"),
        (KernelSpec("linear_gguf_a8", "cpu", "float32", {"I": 256, "O": 8}, {"type": 10.0}), "10"),
        (KernelSpec("linear_gguf", "cpu", "float32", {"I": 256, "O": 8}), "None"),
    ],
)
def test_sizes_that_have_no_layout_are_refused_with_their_numbers(spec: KernelSpec, told: str) -> None:
    probe = provider().supports(spec)
    assert not probe.ok
    assert told in str(probe.wanted)
    with pytest.raises(ConfigError, match=spec.operation):
        provider().make(spec)


@EACH_USE
def test_tensors_that_do_not_fit_are_refused(operation: str, number: int) -> None:
    """Another dtype, another shape or another number of dims of any argument is an error, not a wrong read."""
    case = use(operation, number, 2, 256, 24)
    kernel = provider().make(case.spec("cpu", "float32"))
    inputs = list(case.inputs(torch.float32, "cpu"))
    for place, name in enumerate(OPERATIONS[operation].arguments):
        value = inputs[place]
        assert value is not None
        spoiled = [value.to(torch.int32) if name != "bias" else value[:-1]]
        if value.dim() > 1 and name != "x":
            spoiled += [value[:-1] if place > 1 else value[:, :-1], value.flatten()]
        for wrong in spoiled:
            with pytest.raises(ConfigError):
                kernel(*inputs[:place], wrong, *inputs[place + 1 :])


# --- inside a step ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FolderCheckpoint:
    """A small Llama whose layers are whole blocks."""
    folder = tmp_path_factory.mktemp("models")
    config = tiny_configs()["llama"].to_dict() | {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "head_dim": 16}
    tiny_model(type(tiny_configs()["llama"])(**config)).save_pretrained(folder)
    return FolderCheckpoint(folder)


_SMALLER = 0.05
"""What the oracle's weights are multiplied by, so that activations stay near 1."""


def pack(linear: Any, operation: str, number: int, seed: int) -> PackedLinear:
    """A layer with random packed weights in a linear layer's place, about as large as they were."""
    outer, inner = linear.weight.shape
    case = use(operation, number if "gguf" in operation else 0, 1, inner, outer, group=inner // 2)
    inputs = dict(zip(OPERATIONS[operation].arguments, case.inputs(torch.float32, "cpu", seed), strict=True))
    tensors = {name: inputs[name] for name in names_of(operation)}
    for name, value in tensors.items():
        assert value is not None
        if name in ("scales", "mins"):
            value.mul_(_SMALLER)
        elif name == "blocks":
            halves = value.view(-1, BLOCK_TYPES[number].num_bytes)[:, :2]
            halves.copy_((halves.clone().view(torch.float16) * _SMALLER).view(torch.uint8))
    packed = PackedWeight(operation, tensors, outer, inner, case.params)  # type: ignore[arg-type]
    bias = None if linear.bias is None else linear.bias.detach()
    return PackedLinear(packed, bias)


PROJECTIONS = (
    *(("self_attn", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(("mlp", name) for name in ("gate_proj", "up_proj", "down_proj")),
)


def put_packed(module: Any, kernels: CpuKernels | ReferenceKernels, choice: Any, dtype: torch.dtype) -> int:
    """Pack the projections that ``choice(layer, place)`` gives an operation for; returns how many."""
    count = 0
    for number, layer in enumerate(module.model.layers):
        for place, (part, name) in enumerate(PROJECTIONS):
            operation = choice(number, place)
            if operation is not None:
                owner = getattr(layer, part)
                setattr(owner, name, pack(getattr(owner, name), operation, 8, number * 10 + place))
                count += 1
    bind_packed(module, kernels.make, dtype)
    return count


CHOICES = {
    **{operation: (lambda layer, place, op=operation: op) for operation in DECODERS},
    "mixed with dense": lambda layer, place: (*sorted(DECODERS), None, None)[(layer * 7 + place) % (len(DECODERS) + 2)],
    "rounded beside exact": lambda layer, place: ("linear_w8a8", "linear_int8", None)[(layer + place) % 3],
}


STEPS_OF = [
    (chosen, dtype)
    for chosen in sorted(CHOICES)
    for dtype in (torch.float32, torch.bfloat16)
    # What bfloat16 leaves of activations is often rounded the other way.
    if dtype == torch.float32 or (chosen in OPERATIONS and not OPERATIONS[chosen].rounds_inputs)
]


@pytest.mark.parametrize(("chosen", "dtype"), STEPS_OF)
def test_a_step_with_packed_layers_is_one_call_and_scores_as_the_layers_do(
    checkpoint: FolderCheckpoint, chosen: str, dtype: torch.dtype
) -> None:
    """Every format, formats mixed within a layer, and dense layers beside packed ones; last tokens alone too."""
    results = []
    for kernels, backend in ((provider(), PagedCpuAttention), (REFERENCE, SdpaAttention)):
        module = build(checkpoint, kernels if kernels is not REFERENCE else None, dtype)
        assert put_packed(module, kernels, CHOICES[chosen], dtype) > 0
        calls = calls_of(module) if kernels is not REFERENCE else None
        results.append(scores(module, backend))
        if calls is None:
            continue
        alone = scores(module, backend, ends_only=True)
        assert calls.count == 2 * len(STEPS)
    found, wanted = results
    # What is rounded to few bits may be rounded the other way, once in a while.
    rounds = (chosen in OPERATIONS and OPERATIONS[chosen].rounds_inputs) or chosen not in OPERATIONS

    def error(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())

    assert error(found, wanted) < (0.05 if dtype == torch.bfloat16 else 5e-3 if rounds else 1e-5)
    assert error(alone, ends(found)) < (0.05 if dtype == torch.bfloat16 or rounds else 1e-5)


def test_permuted_inputs_are_left_to_the_layers(checkpoint: FolderCheckpoint) -> None:
    module = build(checkpoint, provider())
    put_packed(module, provider(), CHOICES["linear_int8"], torch.float32)
    layer = module.model.layers[1].mlp.down_proj
    order = torch.randperm(layer.in_features)
    module.model.layers[1].mlp.down_proj = PackedLinear(
        PackedWeight("linear_int8", layer.packed.tensors, layer.out_features, layer.in_features, {}, order)
    )
    bind_packed(module, provider().make, torch.float32)
    calls = calls_of(module)
    found = scores(module, PagedCpuAttention)
    assert calls.count == 0
    torch.testing.assert_close(found, scores(module, SdpaAttention), rtol=1e-4, atol=1e-4)


def test_packed_weights_that_are_loaded_anew_are_seen(checkpoint: FolderCheckpoint) -> None:
    """They are read where they lie, scales too: what a state dict brings is used by the next step."""
    module = build(checkpoint, provider())
    put_packed(module, provider(), CHOICES["linear_fp8a8"], torch.float32)
    before = scores(module, PagedCpuAttention)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    for name, value in state.items():
        if name.endswith((".scales", ".x_scale")):
            value.mul_(1.5)
    module.load_state_dict(state)
    after = scores(module, PagedCpuAttention)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, scores(module, SdpaAttention), rtol=1e-3, atol=1e-3)


def test_packed_weights_that_are_replaced_are_seen(checkpoint: FolderCheckpoint) -> None:
    """As moving a module there and back does: its layers keep other tensors afterwards."""
    module = build(checkpoint, provider())
    put_packed(module, provider(), CHOICES["linear_int4"], torch.float32)
    calls = calls_of(module)
    before = scores(module, PagedCpuAttention)
    for layer in module.model.layers:
        for part, name in PROJECTIONS:
            packed = getattr(getattr(layer, part), name)
            old, packed.scales = packed.scales, packed.scales * 1.5
            old.fill_(float("nan"))
    after = scores(module, PagedCpuAttention)
    assert calls.count == 2 * len(STEPS)
    assert after.isfinite().all()
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, scores(module, SdpaAttention), rtol=1e-4, atol=1e-4)


def test_every_layout_of_packed_weights_has_a_kernel() -> None:
    assert set(DECODERS) <= provider().operations()
    assert set(HERE) <= set(VARIANTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", ["dense", "linear_int8", "linear_int4"])
def test_what_an_earlier_step_has_left_behind_does_not_matter(
    checkpoint: FolderCheckpoint, chosen: str, dtype: torch.dtype
) -> None:
    """Numbers that are none, in memory that a step takes over from another product, do not come through."""
    module = build(checkpoint, provider(), dtype)
    if chosen != "dense":
        put_packed(module, provider(), CHOICES[chosen], dtype)
    wanted = scores(module, PagedCpuAttention)
    name = str(dtype).removeprefix("torch.")
    for size in (64, 96, 100, 300):
        kernel = provider().make(KernelSpec("gated_linear", "cpu", name, {"I": size, "O": size}, {"activation": 0.0}))
        bad = torch.full((70, size), torch.nan, dtype=dtype)
        assert kernel(bad, torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)).isnan().all()
        assert torch.equal(scores(module, PagedCpuAttention), wanted), f"after a product of size {size}"


def test_weights_that_a_callable_has_seen_may_change_and_be_replaced() -> None:
    """What is remembered of a layer's tensors never outlives them."""
    case = use("linear_int8", 0, 1, 64, 32)
    inputs = case.inputs(torch.float32, "cpu", 3)
    kernel, reference = provider().make(case.spec("cpu", "float32")), REFERENCE.make(case.spec("cpu", "float32"))
    x, weight, scales, bias = inputs
    assert weight is not None
    assert scales is not None
    for change in ("first", "written to", "other memory", "another tensor"):
        if change == "written to":
            weight.neg_()
            scales.mul_(2)
        elif change == "other memory":
            weight.data = weight.clone().roll(1, 0)
        elif change == "another tensor":
            scales = scales * 3
        found, wanted = kernel(x, weight, scales, bias), reference(x, weight, scales, bias)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4, msg=f"weights that are {change}")
