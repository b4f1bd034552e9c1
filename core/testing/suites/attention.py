"""What an attention backend has to do: whatever the batch, each query gets what a plain loop over its own tokens gives.

Shapes: T query tokens of a step; H query heads; G key/value heads; D head size; B blocks of the cache; N tokens in a
block.

What a backend does not do, its probe must refuse: a shape, dtype, window, soft cap or KV format that the probe says no
to is skipped as not claimed. A backend may also claim ``batch_invariant``: a sequence's output is the same to the last
bit whatever else is in the step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import pytest
import torch

from drivetrain.contracts.attention import (
    FULL_KV,
    PAGED_BNGD,
    SCALED_KV,
    AttentionBackend,
    AttentionSpec,
    KVContract,
    LayerAttention,
)
from drivetrain.contracts.model import ModelSpec
from drivetrain.contracts.plugin import ProbeContext, Purpose
from drivetrain.registry import Registry, load
from drivetrain.testing.attention_oracle import Attended, PlainStep, Trial, opened, recorded_decodes, whole_batch
from drivetrain.testing.measure import HostTraffic, tensor_bytes
from drivetrain.testing.places import DeviceSuite

TOLERANCES: Mapping[str, tuple[float, float]] = {
    "float64": (1e-9, 1e-9),
    "float32": (1e-4, 2e-5),
    "float16": (4e-3, 4e-3),
    "bfloat16": (3e-2, 3e-2),
    "int8": (6e-2, 6e-2),
    "float8_e4m3fn": (1.2e-1, 1.2e-1),
    "float8_e5m2": (2.5e-1, 2.5e-1),
}
"""dtype of the queries or of the stored keys, whichever is coarser -> (relative, absolute) distance from the plain loop
in float64 over the same rounded inputs that still passes."""

HEADS = ((1, 1, 8), (4, 2, 16), (6, 6, 12), (9, 3, 64), (8, 1, 32), (5, 5, 7))
"""Query heads, key/value heads and head size of the shapes under test."""

MIXED: tuple[dict[int, int], ...] = (
    {0: 5, 1: 1, 2: 9},
    {0: 1, 1: 1, 2: 1},
    {2: 1, 3: 7, 0: 3},
    {3: 1, 1: 4, 0: 1, 2: 1},
    {3: 1, 2: 1, 1: 1, 0: 1},
)
"""Steps as sequence -> new tokens: prefills, chunks behind a context and decodes in one batch, in changing order."""

KV_FORMATS = tuple(SCALED_KV)

Steps = Sequence[Mapping[int, int]]


def spec_of(
    windows: Sequence[int | None] = (None, None),
    heads: tuple[int, int, int] = (4, 2, 16),
    cap: float | None = None,
    dtype: str = "float32",
    kv: str = FULL_KV,
) -> AttentionSpec:
    """One layer for each window; every layer has a scale of its own."""
    num_heads, num_kv_heads, size = heads
    return AttentionSpec(
        tuple(
            LayerAttention(num_heads, num_kv_heads, size, (0.7 + 0.6 * index) / math.sqrt(size), window, cap)
            for index, window in enumerate(windows)
        ),
        dtype,
        kv,
    )


def model_of(attention: AttentionSpec) -> ModelSpec:
    """A model that has this attention and nothing else of note."""
    hidden = attention.layers[0].num_heads * attention.layers[0].head_size
    return ModelSpec("LlamaForCausalLM", 128, hidden, len(attention.layers), 4096, 10_000, attention)


def tolerance_of(backend: AttentionBackend, spec: AttentionSpec) -> tuple[float, float]:
    """The published tolerance for what ``backend`` computes with and stores."""
    return max(TOLERANCES[spec.dtype], TOLERANCES[backend.kv_contract(spec).dtype])


def assert_as_plain(backend: AttentionBackend, spec: AttentionSpec, results: Iterable[Attended]) -> None:
    """Every output is of the queries' dtype and within the published tolerance of the plain loop."""
    relative, absolute = tolerance_of(backend, spec)
    for result in results:
        found = result.found.detach().double().cpu()
        where = f"layer {result.layer} ({spec.layers[result.layer]}), sequence {result.sequence}"

        def explain(text: str, where: str = where) -> str:
            return f"{where}: {text}"

        torch.testing.assert_close(found, result.wanted, rtol=relative, atol=absolute, msg=explain)


class AttentionSuite(DeviceSuite):
    """The examination of an attention backend."""

    kind = "attention"

    # --- what the tests use ------------------------------------------------------------------------------------------

    @classmethod
    def require_spec(cls, spec: AttentionSpec, purpose: Purpose = Purpose.SERVE) -> torch.device:
        """The device to compute on; skips the test unless the backend claims all that ``spec`` asks for."""
        if any(layer.window is not None for layer in spec.layers):
            cls.require_claim("windows")
        if any(layer.soft_cap is not None for layer in spec.layers):
            cls.require_claim("soft_cap")
        if purpose is Purpose.TRAIN:
            cls.require_claim("training")
        if spec.kv != FULL_KV:
            cls.require_claim(f"kv_{spec.kv}")
        cls.require_dtype(spec.dtype, model_of(spec), purpose)
        return cls.place().device

    @classmethod
    def context(cls, dtype: str, model: ModelSpec | None = None, purpose: Purpose = Purpose.SERVE) -> ProbeContext:
        """As the probe is told once the quantizer is chosen."""
        context = super().context(dtype, model, purpose)
        return context if model is None else dataclasses.replace(context, kv=model.attention.kv)

    @classmethod
    def backends(cls) -> list[AttentionBackend]:
        """The backend as configured, and with every other block size of 1, 4 and 32 that its Config takes."""
        made: list[AttentionBackend] = [cls.make()]
        if "block_size" in cls.plugin_class().Config.model_fields and "block_size" not in cls.options:
            for size in (1, 4, 32):
                try:
                    made.append(cls.make(block_size=size))
                except ValueError:
                    continue  # an option its Config refuses is one that it does not claim
        return made

    @classmethod
    def check_steps(cls, spec: AttentionSpec, steps: Steps, *, tokens: int = 192) -> None:
        """Every output of every step equals the plain loop's, for every block size."""
        device = cls.require_spec(spec)
        for backend in cls.backends():
            trial = Trial(backend, spec, device, tokens=tokens)
            for new_tokens in steps:
                assert_as_plain(backend, spec, trial.step(new_tokens))

    # --- numbers -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    @pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "x".join(map(str, heads)))
    def test_mixed_batches_equal_the_plain_loop(self, heads: tuple[int, int, int], dtype: str) -> None:
        """Prefills, chunks and decodes in one batch, over shuffled blocks, for every head layout and dtype."""
        self.check_steps(spec_of(heads=heads, dtype=dtype), MIXED)

    def test_each_layers_own_scale_is_used(self) -> None:
        """Scores are multiplied by the layer's scale, not by one that is derived from the head size."""
        spec = spec_of()
        layers = tuple(
            dataclasses.replace(layer, scale=scale) for layer, scale in zip(spec.layers, (0.05, 1.3), strict=True)
        )
        self.check_steps(dataclasses.replace(spec, layers=layers), MIXED)

    def test_a_single_token_attends_to_itself(self) -> None:
        """The smallest step there is: one sequence, one token, no context; then its second token."""
        self.check_steps(spec_of(), ({0: 1}, {0: 1}))

    @pytest.mark.parametrize("first", [1, 3, 4, 5, 15])
    def test_a_prompt_may_be_cut_anywhere(self, first: int) -> None:
        """A prompt's second chunk sees the first one through the cache."""
        self.check_steps(spec_of(), ({0: first}, {0: 16 - first}, {0: 1}))

    def test_many_decodes_of_different_lengths(self) -> None:
        """A batch of forty decodes whose lengths differ tenfold."""
        prompts = {s: 1 + (s * 7) % 11 for s in range(40)}
        decodes = dict.fromkeys(prompts, 1)
        self.check_steps(spec_of(heads=(2, 1, 64)), (prompts, decodes, decodes), tokens=500)

    def test_a_long_context(self) -> None:
        """Several hundred tokens of context, beyond what one tile of a kernel holds."""
        steps: list[dict[int, int]] = [{0: 300, 1: 70}, {0: 1, 1: 1}, {0: 2, 1: 130}, {0: 1, 1: 1}]
        self.check_steps(spec_of((None,), heads=(2, 1, 64)), steps, tokens=600)

    @pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 16, 17, 100])
    def test_windows_equal_the_plain_loop(self, window: int) -> None:
        """A query sees ``window`` tokens, itself included, beside layers that see all; blocks that a window has left
        go to others."""
        steps = (*MIXED, {0: 9, 3: 1}, {1: 17}, {0: 1, 1: 1, 2: 1, 3: 1})
        self.check_steps(spec_of((None, window, None)), steps)

    def test_a_window_at_the_edge_of_a_block(self) -> None:
        """Windows of one token less than a block, of a block, and of one more, decoded across several edges."""
        for backend in self.backends():
            size = backend.kv_contract(spec_of()).block_size
            windows = tuple(sorted({max(1, size - 1), size, size + 1}))
            spec = spec_of(windows)
            trial = Trial(backend, spec, self.require_spec(spec))
            for new in (max(1, size - 1), 1, 1, size, *[1] * min(size, 6)):
                assert_as_plain(backend, spec, trial.step({0: new}))

    @pytest.mark.parametrize("windows", [(None, None), (None, 3)], ids=["full", "windows"])
    @pytest.mark.parametrize("cap", [0.7, 30.0])
    def test_soft_caps_equal_the_plain_loop(self, cap: float, windows: tuple[int | None, ...]) -> None:
        """Scores become ``cap * tanh(scores / cap)`` before the softmax, in prefill and decode."""
        self.check_steps(spec_of(windows, cap=cap), MIXED)

    def test_huge_scores_stay_finite(self) -> None:
        """Scores that overflow an exponential are no reason for an infinity."""
        spec = spec_of((None,))
        device = self.require_spec(spec)
        for backend in self.backends():
            trial = Trial(backend, spec, device)
            trial.loudness[0] = 1e4
            for new_tokens in ({0: 6}, {0: 1}):
                for result in trial.step(new_tokens):
                    assert torch.isfinite(result.found).all(), "the output has an infinity or a NaN"

    def test_decodes_take_their_lengths_from_the_device(self) -> None:
        """As recorded steps give them: contexts that the host names are those of nobody. For ``graph_safe``."""
        self.require_claim("graph_safe")
        spec = spec_of(self._windows_it_claims())
        for backend in self.backends():
            told = functools.partial(recorded_decodes, block_size=backend.kv_contract(spec).block_size)
            trial = Trial(backend, spec, self.require_spec(spec))
            trial.step({0: 5, 1: 1, 2: 30})
            for new_tokens in ({0: 1, 1: 1, 2: 1}, {2: 1, 1: 1}):
                assert_as_plain(backend, spec, trial.step(new_tokens, told=told))

    @pytest.mark.parametrize("write", [False, True], ids=["backend_writes", "model_writes"])
    def test_open_batches_equal_the_plain_loop(self, write: bool) -> None:
        """Only the device knows how tokens are divided, and some sequences have none. For ``graph_safe_prompts``."""
        self.require_claim("graph_safe_prompts")
        if write:
            self.require_claim("takes_written")
        spec = spec_of(self._windows_it_claims())
        for backend in self.backends():
            trial = Trial(backend, spec, self.require_spec(spec))
            for new_tokens in (*MIXED, {0: 37}):
                assert_as_plain(backend, spec, trial.step(new_tokens, write=write, told=opened))

    def _windows_it_claims(self) -> tuple[int | None, ...]:
        return (None, 3) if self.claims("windows") else (None, None)

    # --- the cache ---------------------------------------------------------------------------------------------------

    def test_the_cache_keeps_what_was_written(self) -> None:
        """What a sequence wrote is there many steps later, whatever others wrote meanwhile."""
        others: list[dict[int, int]] = [{1: 9}, {2: 13}, {1: 1, 2: 1}, {3: 30}]
        self.check_steps(spec_of(), ({0: 11}, *others, {0: 1}, *others, {0: 3}))

    def test_a_reused_block_shows_nothing_of_its_past(self) -> None:
        """A sequence that gets blocks of an ended one sees only what it wrote itself, however loud the past was."""
        spec = spec_of()
        device = self.require_spec(spec)
        for backend in self.backends():
            trial = Trial(backend, spec, device)
            trial.loudness = {0: 40.0, 1: 40.0}
            trial.step({0: 37, 1: 37})
            trial.release(0)
            trial.release(1)
            for new_tokens in ({2: 1, 3: 6}, {2: 1, 3: 1}, {2: 4, 3: 1}):
                assert_as_plain(backend, spec, trial.step(new_tokens))

    def test_entries_that_are_not_used_are_not_read(self) -> None:
        """The zeros in a block table mean nothing: block 0 belongs to somebody else, who is loud."""
        spec = spec_of()
        device = self.require_spec(spec)
        for backend in self.backends():
            trial = Trial(backend, spec, device)
            trial.loudness[0] = 40.0
            trial.step({0: 2})  # the first sequence gets block 0
            for new_tokens in ({1: 3, 2: 40}, {1: 1, 2: 1}, {2: 1, 1: 2}):
                assert_as_plain(backend, spec, trial.step(new_tokens))

    def test_cleared_blocks_are_clean(self) -> None:
        """After ``clear_blocks``, not even a NaN that was written there is felt."""
        spec = spec_of()
        device = self.require_spec(spec)
        for backend in self.backends():
            trial = Trial(backend, spec, device)
            trial.loudness[0] = math.nan
            trial.step({0: 21})
            for group, blocks in zip(spec.groups, trial.release(0), strict=True):
                backend.clear_blocks(trial.cache, group, blocks)
                backend.clear_blocks(trial.cache, group, [])
            for new_tokens in ({1: 5}, {1: 1}, {1: 6, 2: 2}):
                assert_as_plain(backend, spec, trial.step(new_tokens))

    @pytest.mark.parametrize("windows", [(None, None), (None, 40)], ids=["full", "windows"])
    def test_copied_blocks_live_on_their_own(self, windows: tuple[int | None, ...]) -> None:
        """A sequence that starts from copies of another's blocks has its past, and then a future of its own."""
        spec = spec_of(windows)
        device = self.require_spec(spec)
        for backend in self.backends():
            trial = Trial(backend, spec, device)
            trial.step({0: 22, 1: 5})
            trial.fork(0, 2)
            backend.copy_blocks(trial.cache, spec.groups[0], [])
            for new_tokens in ({0: 1, 2: 1, 1: 1}, {2: 3, 0: 2}, {0: 1, 1: 1, 2: 1}):
                assert_as_plain(backend, spec, trial.step(new_tokens))

    def test_a_fresh_instance_goes_on_with_the_cache(self) -> None:
        """All state is in the cache: another instance takes over between two steps, and the first one takes it back."""
        spec = spec_of()
        device = self.require_spec(spec)
        for backend in self.backends():
            trial = Trial(backend, spec, device)
            trial.step({0: 9, 1: 3})
            for taken_over in (type(backend)(backend.config), backend):
                trial.backend = taken_over
                assert_as_plain(backend, spec, trial.step({0: 1, 1: 4}))

    def test_equal_contracts_share_a_cache(self) -> None:
        """A backend whose KV contract equals that of ``sdpa`` goes on with its cache, and gives it back: so it is
        swapped in a live server."""
        spec = spec_of()
        device = self.require_spec(spec)
        plugin = load(Registry().find("attention", "sdpa"))
        backend: AttentionBackend = self.make()
        own = backend.kv_contract(spec)
        sdpa = plugin(plugin.Config.model_validate({"block_size": own.block_size}))
        assert isinstance(sdpa, AttentionBackend)
        if sdpa.kv_contract(spec) != own:
            pytest.skip(f"not claimed: the KV contract {own.layout} is not that of sdpa")
        for order in ((sdpa, backend, sdpa, backend), (backend, sdpa, backend, sdpa)):
            trial = Trial(order[0], spec, device)
            for new_tokens, active in zip(({0: 9, 1: 3}, {0: 1, 1: 4}, {0: 2, 1: 1}, {0: 1, 1: 1}), order, strict=True):
                trial.backend = active
                assert_as_plain(backend, spec, trial.step(new_tokens))

    def test_bytes_per_block_is_what_a_block_takes(self) -> None:
        """The engine sizes the cache by ``bytes_per_block``: an allocated block takes no more, and not much less."""
        spec = spec_of((None, None, 9) if self.claims("windows") else (None, None), heads=(8, 4, 64))
        device = self.require_spec(spec)
        for backend in self.backends():
            base = tensor_bytes(backend.allocate(spec, [8] * len(spec.groups), device))
            if base == 0:
                pytest.skip("not measured: the cache holds no torch tensors")
            for group in spec.groups:
                counts = [40 if other == group else 8 for other in spec.groups]
                taken = (tensor_bytes(backend.allocate(spec, counts, device)) - base) / 32
                claimed = backend.bytes_per_block(spec, group)
                assert taken <= claimed, f"{group}: a block takes {taken:.0f} bytes, {claimed} are claimed"
                assert taken >= 0.9 * claimed, f"{group}: a block takes only {taken:.0f} of the claimed {claimed} bytes"

    def test_the_kv_contract_is_a_value(self) -> None:
        """Asked twice, or of two equal backends, it is the same; it can be a key; it names a dtype of torch."""
        spec = spec_of()
        first, again, other = (backend.kv_contract(spec) for backend in (self.make(), self.make(), self.make()))
        assert isinstance(first, KVContract)
        assert first == again == other
        assert len({first, again, other}) == 1
        assert first.block_size >= 1
        assert isinstance(getattr(torch, first.dtype, None), torch.dtype), f"no torch dtype is named {first.dtype!r}"
        assert "/" in first.layout, f"the layout {first.layout!r} has no version: name it like 'paged-BNGD/1'"

    def test_sizes_are_pure(self) -> None:
        """``bytes_per_block`` gives the same answer every time, and more for more layers."""
        backend, spec = self.make(), spec_of()
        single = spec_of((None,))
        first = backend.bytes_per_block(spec, spec.groups[0])
        assert first == backend.bytes_per_block(spec, spec.groups[0])
        assert backend.bytes_per_block(single, single.groups[0]) < first

    # --- keys and values with scales ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("kv", KV_FORMATS)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "x".join(map(str, heads)))
    def test_scaled_keys_stay_near_the_plain_loop(self, heads: tuple[int, int, int], dtype: str, kv: str) -> None:
        """Kept as int8 or fp8, prefills, chunks and decodes are within the format's tolerance of unrounded ones."""
        self.check_steps(spec_of(heads=heads, dtype=dtype, kv=kv), MIXED)

    @pytest.mark.parametrize("kv", KV_FORMATS)
    def test_scaled_keys_under_windows_and_caps(self, kv: str) -> None:
        """The same with windows and a soft cap, as far as they are claimed, and over a long context."""
        windows = (None, 7) if self.claims("windows") else (None, None)
        self.check_steps(spec_of(windows, cap=5.0 if self.claims("soft_cap") else None, kv=kv), MIXED)
        steps: list[dict[int, int]] = [{0: 300, 1: 70}, {0: 1, 1: 1}, {0: 2, 1: 30}]
        self.check_steps(spec_of((None,), heads=(2, 1, 16), kv=kv), steps, tokens=600)

    @pytest.mark.parametrize("kv", KV_FORMATS)
    def test_the_kv_contract_tells_the_format(self, kv: str) -> None:
        """The stored dtype is that of the format, and no layout with scales passes for one without; nor does a block
        take more than the format needs."""
        spec, full = spec_of((None,), heads=(8, 4, 64), kv=kv), spec_of((None,), heads=(8, 4, 64))
        self.require_spec(spec)
        backend: AttentionBackend = self.make()
        contract = backend.kv_contract(spec)
        assert contract.dtype == SCALED_KV[kv][0]
        assert contract.layout not in (PAGED_BNGD, backend.kv_contract(full).layout)
        counts = [backend.bytes_per_block(s, s.groups[0]) for s in (spec, full)]
        assert counts[0] <= 0.3 * counts[1], f"a block takes {counts[0]} bytes, and {counts[1]} in float32"

    @pytest.mark.parametrize("kv", KV_FORMATS)
    def test_scales_are_counted(self, kv: str) -> None:
        """``bytes_per_block`` is what a block takes with its scales."""
        spec = spec_of(heads=(8, 4, 16), kv=kv)
        device = self.require_spec(spec)
        for backend in self.backends():
            small, large = (tensor_bytes(backend.allocate(spec, [count], device)) for count in (8, 40))
            claimed = backend.bytes_per_block(spec, spec.groups[0])
            assert (large - small) / 32 <= claimed, f"a block takes {(large - small) / 32:.0f} bytes, {claimed} claimed"
            assert (large - small) / 32 >= 0.95 * claimed

    @pytest.mark.parametrize("kv", KV_FORMATS)
    def test_each_head_and_token_has_a_scale_of_its_own(self, kv: str) -> None:
        """A quiet head beside a loud one, and a quiet sequence after a loud one, keep their precision."""
        spec = spec_of((None,), heads=(4, 2, 16), kv=kv)
        device = self.require_spec(spec)
        relative, absolute = TOLERANCES[SCALED_KV[kv][0]]
        for backend in self.backends():
            trial = Trial(backend, spec, device)
            trial.head_loudness = (100.0, 0.01)
            for new_tokens in ({0: 9, 1: 3}, {0: 1, 1: 2}):
                for result in trial.step(new_tokens):
                    for heads, loudness in ((slice(0, 2), 100.0), (slice(2, 4), 0.01)):
                        found, wanted = (x[:, heads].double().cpu() for x in (result.found, result.wanted))
                        torch.testing.assert_close(found, wanted, rtol=relative, atol=absolute * loudness)

    @pytest.mark.parametrize("kv", KV_FORMATS)
    def test_zeros_and_huge_keys_are_kept(self, kv: str) -> None:
        """Keys and values of zeros have no largest number to divide by, and huge ones overflow nothing."""
        spec = spec_of((None,), kv=kv)
        device = self.require_spec(spec)
        for backend in self.backends():
            trial = Trial(backend, spec, device)
            trial.loudness = {0: 0.0, 1: 1e18}
            for new_tokens in ({0: 6, 1: 1}, {0: 1, 1: 1}):
                for result in trial.step(new_tokens):
                    assert torch.isfinite(result.found).all(), f"sequence {result.sequence} is not finite"
                    if result.sequence == 0:
                        assert not result.found.any(), "values of zeros give something else than zeros"
                    if result.sequence == 1:
                        assert result.found.abs().max() > 1e16, "huge values became small"

    @pytest.mark.parametrize("kv", KV_FORMATS)
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_what_is_not_finite_stays_visible(self, bad: float, kv: str) -> None:
        """Rounding hides no fault: who sees a key or value that is not finite gets something that is not either, until
        the block is cleared."""
        spec = spec_of((None,), kv=kv)
        device = self.require_spec(spec)
        for backend in self.backends():
            trial = Trial(backend, spec, device)
            trial.loudness[0] = bad
            for new_tokens in ({0: 19}, {0: 1}):
                for result in trial.step(new_tokens):
                    assert not torch.isfinite(result.found).any(), "a value that is not finite was hidden"
            for group, blocks in zip(spec.groups, trial.release(0), strict=True):
                backend.clear_blocks(trial.cache, group, blocks)
            for new_tokens in ({1: 5}, {1: 1}):
                assert_as_plain(backend, spec, trial.step(new_tokens))

    @pytest.mark.parametrize("kv", KV_FORMATS)
    def test_scales_go_with_copied_blocks(self, kv: str) -> None:
        """A copy of blocks has their scales too."""
        spec = spec_of(kv=kv)
        device = self.require_spec(spec)
        for backend in self.backends():
            trial = Trial(backend, spec, device)
            trial.step({0: 22, 1: 5})
            trial.fork(0, 2)
            for new_tokens in ({0: 1, 2: 1}, {2: 3, 0: 2}):
                assert_as_plain(backend, spec, trial.step(new_tokens))

    @pytest.mark.parametrize("kv", KV_FORMATS)
    def test_a_cut_does_not_change_scaled_keys(self, kv: str) -> None:
        """A prompt in one piece, in chunks, and token by token gives the same, but for the last bits: a query sees its
        own step's keys as later steps will."""
        spec = spec_of((None,), kv=kv)
        device = self.require_spec(spec)
        for backend in self.backends():
            outputs = []
            for cut in ([14], [6, 8], [1] * 14):
                trial = Trial(backend, spec, device)
                # Queries are the same by position, so outputs are too.
                outputs.append(torch.cat([result.found for new in cut for result in trial.step({0: new})]))
            for other in outputs[1:]:
                torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kv", KV_FORMATS)
    def test_equal_contracts_share_scaled_keys(self, kv: str) -> None:
        """A backend whose KV contract for this format equals that of ``sdpa`` goes on with its cache."""
        spec = spec_of(kv=kv)
        device = self.require_spec(spec)
        plugin = load(Registry().find("attention", "sdpa"))
        backend: AttentionBackend = self.make()
        own = backend.kv_contract(spec)
        sdpa = plugin(plugin.Config.model_validate({"block_size": own.block_size}))
        assert isinstance(sdpa, AttentionBackend)
        if sdpa.kv_contract(spec) != own:
            pytest.skip(f"not claimed: the KV contract {own.layout} is not that of sdpa")
        outputs = []
        for order in ((sdpa, sdpa, sdpa), (sdpa, backend, sdpa), (backend, sdpa, backend)):
            trial = Trial(order[0], spec, device)
            found = []
            for new_tokens, active in zip(({0: 9, 1: 3}, {0: 1, 1: 4}, {0: 2, 1: 1}), order, strict=True):
                trial.backend = active
                found += [result.found for result in trial.step(new_tokens)]
            outputs.append(torch.cat(found))
        for other in outputs[1:]:
            torch.testing.assert_close(other, outputs[0], rtol=1e-3, atol=1e-3)

    # --- manners of a step -------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_outputs_have_the_queries_form(self, dtype: str) -> None:
        """[T, H, D] in the queries' dtype on their device."""
        spec = spec_of(dtype=dtype)
        device = self.require_spec(spec)
        for results in self._two_steps(spec, device):
            for result in results:
                assert result.found.dtype == getattr(torch, dtype), f"the output is {result.found.dtype}"
                assert result.found.shape == result.wanted.shape
                assert result.found.device.type == device.type, f"the output is on {result.found.device}"

    def test_inputs_are_left_alone(self) -> None:
        """Neither queries, keys and values nor the batch are written to."""
        spec = spec_of()
        device = self.require_spec(spec)
        backend = self.make()
        trial = Trial(backend, spec, device)
        trial.step({0: 5, 1: 20})
        batch = trial.book.batch({0: 1, 1: 3}, device)
        layer = spec.layers[0]
        q = torch.randn(4, layer.num_heads, layer.head_size).to(device)
        k, v = torch.randn(2, 4, layer.num_kv_heads, layer.head_size).to(device)
        inputs = [q, k, v, batch.query_starts, batch.kv_lengths, *batch.block_tables, *batch.slots]
        before = [x.clone() for x in inputs]
        backend.begin(spec, batch, trial.cache).attend(0, q, k, v)
        for value, old in zip(inputs, before, strict=True):
            assert torch.equal(value, old), "an input was written to"

    def test_inputs_may_be_views(self) -> None:
        """Queries, keys and values that are parts of one wider tensor give the same as their copies."""
        spec = spec_of((None,))
        device = self.require_spec(spec)
        layer = spec.layers[0]
        heads = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
        wide = torch.randn(7, sum(heads), layer.head_size, generator=torch.Generator().manual_seed(3)).to(device)
        outputs = []
        for make in (lambda x: x, lambda x: x.contiguous()):
            trial = Trial(self.make(), spec, device)
            step = trial.backend.begin(spec, trial.book.batch({0: 6, 1: 1}, device), trial.cache)
            outputs.append(step.attend(0, *(make(part) for part in wide.split(heads, dim=1))))
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)

    def test_two_runs_are_the_same_to_the_last_bit(self) -> None:
        """The same steps over a new cache give the same bits."""
        spec = spec_of()
        device = self.require_spec(spec)
        first, second = ([r.found for results in self._two_steps(spec, device) for r in results] for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "a second run gave other bits"

    def test_a_sequence_does_not_feel_its_neighbours(self) -> None:
        """Where batch invariance is claimed: alone or in company, in whatever order, the bits are the same."""
        self.require_claim("batch_invariant")
        spec = spec_of()
        device = self.require_spec(spec)
        for backend in self.backends():
            alone, company = Trial(backend, spec, device), Trial(backend, spec, device)
            for own, all_ in (({0: 19}, {1: 3, 0: 19, 2: 40}), ({0: 1}, {2: 1, 1: 1, 0: 1}), ({0: 2}, {0: 2, 3: 9})):
                wanted = alone.step(own)
                found = [result for result in company.step(all_) if result.sequence == 0]
                for a, b in zip(wanted, found, strict=True):
                    assert torch.equal(a.found, b.found), f"layer {a.layer}: company changes the bits"

    def test_a_step_stays_on_the_device(self) -> None:
        """``attend`` brings nothing back to the host: neither a detour over the processor nor a wait for it."""
        spec = spec_of()
        device = self.require_spec(spec)
        if device.type == "cpu":
            pytest.skip("not claimed: the device is the host itself")
        backend = self.make()
        trial = Trial(backend, spec, device)
        trial.step({0: 20, 1: 3})
        batch = trial.book.batch({0: 1, 1: 4}, device)
        step = backend.begin(spec, batch, trial.cache)
        layer = spec.layers[0]
        q = torch.randn(5, layer.num_heads, layer.head_size, device=device)
        k, v = torch.randn(2, 5, layer.num_kv_heads, layer.head_size, device=device)
        with HostTraffic() as traffic:
            step.attend(0, q, k, v)
        assert not traffic.operations, f"these brought tensors to the host: {', '.join(traffic.operations)}"

    def test_written_pages_are_as_good_as_given_keys(self) -> None:
        """Where a step takes keys and values that the model wrote itself, it attends as if they had been given."""
        self.require_claim("takes_written")
        spec = spec_of((None, 5) if self.claims("windows") else (None, None))
        device = self.require_spec(spec)
        num_written = 0
        for backend in self.backends():
            given, written = Trial(backend, spec, device), Trial(backend, spec, device)
            for new_tokens in (*MIXED, {0: 1, 1: 1}, {2: 1}):
                wanted = given.step(new_tokens)
                found = written.step(new_tokens, write=True)
                for one, other in zip(wanted, found, strict=True):
                    torch.testing.assert_close(one.found, other.found, rtol=1e-5, atol=1e-5)
            num_written += written.num_written
        assert num_written, "no step offered its pages, not even one of decodes alone"

    # --- training ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "x".join(map(str, heads)))
    def test_without_a_cache_it_equals_the_plain_loop(self, heads: tuple[int, int, int], dtype: str) -> None:
        """Packed sequences, one of them of a single token, each see only themselves."""
        spec = spec_of((None,), heads, dtype=dtype)
        self._compare_training(spec, gradients=False)

    def test_gradients_equal_the_plain_loops(self) -> None:
        """Gradients of queries, keys and values, through every head layout."""
        for heads in ((4, 2, 16), (3, 3, 8), (4, 1, 8)):
            self._compare_training(spec_of((None,), heads), gradients=True)

    def test_gradients_through_windows(self) -> None:
        """The same behind a sliding window."""
        for window in (1, 3, 100):
            self._compare_training(spec_of((window,)), gradients=True)

    def test_gradients_through_a_soft_cap(self) -> None:
        """The same through a soft cap."""
        self._compare_training(spec_of((None,), cap=0.9), gradients=True)

    def test_the_probe_refuses_what_is_not_claimed(self) -> None:
        """Asked for a window, a soft cap, training or a KV format that it does not claim, the probe says no."""
        asked = {
            "windows": (spec_of((None, 4)), Purpose.SERVE),
            "soft_cap": (spec_of(cap=5.0), Purpose.SERVE),
            "training": (spec_of(), Purpose.TRAIN),
            **{f"kv_{kv}": (spec_of(kv=kv), Purpose.SERVE) for kv in KV_FORMATS},
        }
        for ability, (spec, purpose) in asked.items():
            if not self.claims(ability):
                probe = self.plugin_class().probe(self.context(spec.dtype, model_of(spec), purpose))
                assert not probe.ok, f"{ability} is not claimed, yet the probe takes a model that needs it"

    def _two_steps(self, spec: AttentionSpec, device: torch.device) -> Iterator[list[Attended]]:
        trial = Trial(self.make(), spec, device)
        yield trial.step({0: 9, 1: 1, 2: 18})
        yield trial.step({0: 1, 2: 4, 1: 1})

    def _compare_training(self, spec: AttentionSpec, *, gradients: bool) -> None:
        """Outputs, and where asked gradients, of packed sequences without a cache against the plain loop's."""
        device = self.require_spec(spec, Purpose.TRAIN)
        backend, layer, lengths = self.make(), spec.layers[0], [5, 1, 8]
        generator = torch.Generator().manual_seed(7)
        heads = (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads, layer.num_heads)
        dtype: torch.dtype = getattr(torch, spec.dtype)
        *qkv, weight = (
            torch.randn(sum(lengths), count, layer.head_size, generator=generator).to(dtype) for count in heads
        )
        relative, absolute = TOLERANCES[spec.dtype]

        def run(attend: Callable[..., torch.Tensor], place: torch.device) -> list[torch.Tensor]:
            own = [x.to(place).clone().requires_grad_(gradients) for x in qkv]
            out = attend(0, *own)
            assert out.requires_grad == gradients, "the output does not ask for gradients, although the inputs do"
            if not gradients:
                return [out.double().cpu()]
            (out * weight.to(place)).sum().backward()
            missing = [name for name, x in zip("qkv", own, strict=True) if x.grad is None]
            assert not missing, f"no gradient reaches {', '.join(missing)}"
            return [out.detach().double().cpu(), *(x.grad.double().cpu() for x in own if x.grad is not None)]

        found = run(backend.begin(spec, whole_batch(lengths, device), None).attend, device)
        wanted = run(PlainStep(spec, lengths).attend, torch.device("cpu"))
        for name, a, b in zip(("output", "q.grad", "k.grad", "v.grad"), found, wanted, strict=False):

            def explain(text: str, name: str = name) -> str:
                return f"{name}: {text}"

            torch.testing.assert_close(a, b, rtol=relative, atol=absolute * 4, msg=explain)
