"""Attention for Hopper GPUs, as far as it goes without one: when it serves, its lists of tiles, what surrounds its
kernels. That these compile is tested in ``test_triton_compiles.py``, what they compute in ``tests/gpu``."""

from __future__ import annotations

import functools
import heapq
from pathlib import Path

import numpy as np
import pytest
import torch

from drivetrain.contracts.attention import AttentionSpec, LayerAttention
from drivetrain.plugins.attention.paged_triton import PagedTritonAttention
from drivetrain.testing.attention_oracle import PlainStep, whole_batch
from support.interpreted import has_interpreter, has_triton, run_in_interpreter

pytestmark = [has_triton]

CPU = torch.device("cpu")
LENGTHS = ([1], [128], [129, 1, 127], [300, 70, 1000, 256], [2048] * 3)
LAYER = LayerAttention(8, 2, 64, 0.125)


def rows_of(entries: np.ndarray, head: int) -> list[tuple[int, int]]:
    """(first token of the sequence, row in it) of all rows of a head's tiles that are there."""
    own = [entry for entry in entries.tolist() if entry[3] == head]
    return [(start, row) for start, length, first, _, _ in own for row in range(first, min(first + 128, length))]


# --- lists of tiles ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads", "processors"), [(8, 2, 5), (3, 1, 132), (4, 4, 7)])
def test_tiles_cover_every_row_of_every_head_once(
    lengths: list[int], heads: int, kv_heads: int, processors: int
) -> None:
    from drivetrain.kernels.triton import hopper

    sizes = np.array(lengths)
    starts = np.concatenate(([0], sizes.cumsum()))
    wanted = sorted((start, row) for start, length in zip(starts, lengths, strict=False) for row in range(length))
    for entries, num_heads in (
        (hopper.forward_tiles(sizes, heads, kv_heads, processors), heads),
        (hopper.backward_tiles(sizes, kv_heads, processors), kv_heads),
    ):
        assert set(entries[:, 3]) == set(range(num_heads))
        for head in range(num_heads):
            assert sorted(rows_of(entries, head)) == wanted
        for start, length, first, _, _ in entries.tolist():
            assert length == lengths[starts.tolist().index(start)]
            assert first % 128 == 0
            assert first < length


@pytest.mark.parametrize("lengths", LENGTHS)
def test_sequences_have_places_of_their_own_that_begin_at_whole_tiles(lengths: list[int]) -> None:
    from drivetrain.kernels.triton import hopper

    sizes = np.array(lengths)
    entries = hopper.forward_tiles(sizes, 1, 1, 4)
    places = [place + first + row for _, _, first, _, place in entries.tolist() for row in range(128)]
    assert sorted(places) == list(range(hopper.num_places(sizes)))
    assert all(place % 128 == 0 for place in entries[:, 4])


@pytest.mark.parametrize(
    ("lengths", "most"),
    [
        ([16_384], 1.05),
        ([4096] * 4, 1.05),
        ([1024] * 16, 1.05),
        ([8192], 1.05),
        ([2048], 1.1),
        ([7000, 90, 3000], 1.05),
    ],
)
def test_programs_have_about_as_much_to_do(lengths: list[int], most: float) -> None:
    from drivetrain.kernels.triton import hopper

    work = hopper.forward_tiles(np.array(lengths), 32, 8, 132)[:, 2] // 128 + 2
    shares = np.array([work[program::132].sum() for program in range(132)])
    assert shares.max() <= most * shares.mean()


def test_tiles_of_one_sequence_and_head_start_together_but_the_last_by_what_they_cost() -> None:
    from drivetrain.kernels.triton import hopper

    entries = hopper.backward_tiles(np.array([200, 400]), 2, 4).tolist()
    assert [(start, head, first) for start, _, first, head, _ in entries] == [
        *((200, 0, first) for first in (0, 128, 256, 384)),
        *((200, 1, first) for first in (0, 128, 256)),
        *((0, 0, 0), (0, 1, 0), (0, 0, 128), (0, 1, 128), (200, 1, 384)),  # 200, 200, 72, 72 and 16 queries
    ]


@pytest.mark.parametrize("lengths", [[1024] * 16, [2048] * 8, [4096] * 4, [8192] * 2, [16_384], [7000, 90, 3000]])
def test_processors_of_the_backward_end_nearly_together(lengths: list[int]) -> None:
    """Each takes the next tile when it is done with one. With the longest tiles of the last heads at the end, the last
    would end 14% behind the mean."""
    from drivetrain.kernels.triton import hopper

    entries = hopper.backward_tiles(np.array(lengths), 8, 132)
    blocks = -(-entries[:, 1] // 64) - entries[:, 2] // 64  # of 64 queries
    done = [0] * 132
    for tile in blocks.tolist():
        heapq.heapreplace(done, done[0] + tile)
    assert max(done) <= (1.05 if len(set(lengths)) == 1 else 1.1) * blocks.sum() / 132


def test_no_sequences_have_no_tiles() -> None:
    from drivetrain.kernels.triton import hopper

    none = np.array([], dtype=np.int64)
    assert hopper.forward_tiles(none, 4, 2, 132).shape == (0, 5)
    assert hopper.backward_tiles(none, 2, 132).shape == (0, 5)


# --- where it serves -----------------------------------------------------------------------------------------------


@pytest.fixture
def hopper_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drivetrain.kernels.triton.hopper.is_hopper", lambda device: True)


@pytest.mark.usefixtures("hopper_everywhere")
@pytest.mark.parametrize(
    ("layer", "dtype", "is_covered"),
    [
        (LAYER, torch.bfloat16, True),
        (LayerAttention(3, 1, 128, 0.1), torch.float16, True),
        (LAYER, torch.float32, False),
        (LayerAttention(8, 2, 80, 0.1), torch.bfloat16, False),
        (LayerAttention(8, 2, 256, 0.1), torch.bfloat16, False),
        (LayerAttention(8, 2, 64, 0.1, window=100), torch.bfloat16, False),
        (LayerAttention(8, 2, 64, 0.1, soft_cap=30.0), torch.bfloat16, False),
        (LayerAttention(8, 2, 64, -0.1), torch.bfloat16, False),
    ],
)
def test_what_the_kernels_cover(layer: LayerAttention, dtype: torch.dtype, is_covered: bool) -> None:
    from drivetrain.kernels.triton import hopper

    assert hopper.covers(layer, dtype, CPU) == is_covered


def test_no_other_device_is_taken_for_a_hopper_gpu() -> None:
    from drivetrain.kernels.triton import hopper

    assert not hopper.is_hopper(CPU)
    assert not hopper.covers(LAYER, torch.bfloat16, CPU)


def test_what_can_be_copied() -> None:
    from drivetrain.kernels.triton.hopper import can_be_copied

    fused = torch.zeros(6, 12 * 64 + 8, dtype=torch.bfloat16)
    q_k_v = fused[:, : 12 * 64].view(6, 12, 64)
    assert can_be_copied(q_k_v[:, :8])
    assert can_be_copied(q_k_v[:, 10:])
    assert not can_be_copied(torch.zeros(8, 6, 64, dtype=torch.bfloat16).transpose(0, 1))  # heads are not beside
    assert not can_be_copied(fused[:, 1 : 1 + 8 * 64].unflatten(1, (8, 64)))  # begins at an odd place
    assert not can_be_copied(torch.zeros(6, 8 * 64 + 4, dtype=torch.bfloat16)[:, : 8 * 64].unflatten(1, (8, 64)))
    assert not can_be_copied(torch.zeros(0, 8, 64, dtype=torch.bfloat16))


class StandIn:
    """In the place of the launches: attention in plain torch, with logarithms that only its backward knows."""

    def __init__(self, spec: AttentionSpec, lengths: list[int]) -> None:
        self.step, self.calls = PlainStep(spec, lengths), []
        self.logs = torch.full((8, 256), 3.0)

    def forward(self, layer, q_THD, k_TGD, v_TGD, out_THD, tiles, places):  # type: ignore[no-untyped-def]
        assert tiles.dtype == torch.int32
        assert places == self.logs.shape[1]
        self.calls.append("forward")
        out_THD.copy_(self.step.attend(0, q_THD.float(), k_TGD.float(), v_TGD.float()))
        return self.logs

    def backward(self, layer, q_THD, k_TGD, v_TGD, out_THD, logs_HP, grad_THD, forward_tiles, tiles):  # type: ignore[no-untyped-def]
        assert torch.equal(logs_HP, self.logs)
        assert len(forward_tiles) == 4 * len(tiles) == 16
        self.calls.append("backward")
        inputs = [x.float().requires_grad_() for x in (q_THD, k_TGD, v_TGD)]
        with torch.enable_grad():
            out = self.step.attend(0, *inputs)
        return tuple(grad.bfloat16() for grad in torch.autograd.grad(out, inputs, grad_THD.float()))


@pytest.mark.usefixtures("hopper_everywhere")
@pytest.mark.parametrize("case", ["taken", "refused by the config", "deterministic"])
def test_a_step_without_a_cache_takes_them_unless_it_may_not(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from drivetrain.kernels.triton import flash, hopper, launch

    lengths, spec = [70, 20], AttentionSpec((LAYER,), "bfloat16")
    stand_in = StandIn(spec, lengths)
    monkeypatch.setattr(hopper, "forward", stand_in.forward)
    monkeypatch.setattr(hopper, "backward", stand_in.backward)
    monkeypatch.setattr(launch, "num_processors", lambda device: 4)
    portable = functools.partial(stand_in.calls.append, "portable")
    monkeypatch.setattr(flash, "Forward", lambda *arguments: lambda *tensors: portable())
    monkeypatch.setattr("drivetrain.plugins.attention.paged_triton.tuner_of", lambda folder, tune: _untuned())
    backend = PagedTritonAttention(PagedTritonAttention.Config(hopper_kernels=case != "refused by the config"))
    torch.manual_seed(0)
    inputs = [torch.randn(90, heads, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(case == "deterministic")
    try:
        out = backend.begin(spec, whole_batch(lengths, CPU), None).attend(0, *inputs)
    finally:
        torch.use_deterministic_algorithms(before)
    if case != "taken":
        assert stand_in.calls == ["portable"]
        return
    grad = torch.randn(out.shape, dtype=torch.bfloat16)
    found = torch.autograd.grad(out, inputs, grad)
    assert stand_in.calls == ["forward", "backward"]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    wanted = PlainStep(spec, lengths).attend(0, *wide)
    torch.testing.assert_close(out.float(), wanted, rtol=1e-2, atol=1e-2)
    for one, other in zip(found, torch.autograd.grad(wanted, wide, grad.float()), strict=True):
        torch.testing.assert_close(one.float(), other, rtol=1e-2, atol=1e-2)


def _untuned():  # type: ignore[no-untyped-def]
    from drivetrain.kernels.triton.tuning import Tuner

    return Tuner()


# --- in the interpreter --------------------------------------------------------------------------------------------


@has_interpreter
@pytest.mark.slow
def test_what_surrounds_the_backward() -> None:
    run_in_interpreter(Path(__file__).parent / "interpreted", "check_hopper.py")
