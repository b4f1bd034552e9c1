"""What a model plugin has to do: the same scores however tokens are cut and packed, with and without a cache; faults in
the files named; every parameter trainable.

Shapes: T tokens of a step; E hidden size; V vocabulary.

Without further ado the tests run on a tiny Llama, for plugins that build it. Others override ``make_checkpoint``, and
``reference_logits`` where there is something to compare with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from drivetrain.binding import KernelBinder
from drivetrain.contracts.attention import AttentionBackend
from drivetrain.contracts.kernels import KernelProvider, KernelSpec
from drivetrain.contracts.loader import Checkpoint, Loader
from drivetrain.contracts.model import BuildContext, CausalLM, FindsMostLikely, Model, ModelSpec
from drivetrain.contracts.plugin import Plugin, ProbeContext
from drivetrain.contracts.quantizer import Quantizer
from drivetrain.contracts.source import Progress, silent
from drivetrain.errors import LoaderError, MissingTensorError, UnknownArchitectureError
from drivetrain.registry import Registry, load
from drivetrain.serving.swap import share_parameters
from drivetrain.testing.attention_oracle import BlockBook, PlainStep, whole_batch
from drivetrain.testing.measure import Allocations
from drivetrain.testing.model_oracle import TINY_LLAMA, llama_logits, rewrite_checkpoint, write_tiny_llama
from drivetrain.testing.places import DeviceSuite
from drivetrain.testing.suite import not_run

TOLERANCES: Mapping[str, tuple[float, float]] = {
    "float32": (1e-3, 2e-4),
    "float16": (3e-2, 3e-2),
    "bfloat16": (2e-1, 2e-1),
}
"""Parameter dtype -> (relative, absolute) distance that passes between scores of the same tokens, cut and packed
another way or computed by the reference, for models of a few layers whose scores are of the order of 1."""

MAX_DESCRIBE_BYTES = 2**20
"""The largest tensor that ``describe`` may make outside of the meta device."""

SPLITS = ((1,) * 13, (5, 8), (12, 1), (1, 12), (4, 4, 4, 1))
"""How a sequence of 13 tokens is cut into steps."""


class RecordingQuantizer(Quantizer):
    """Leaves every layer as it is, and remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__(self.Config.model_validate({}))
        self.seen: list[tuple[str, torch.Tensor]] = []

    def bits_per_weight(self) -> float | None:
        return None

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        self.seen.append((name, linear.weight.detach().clone()))
        return linear


class CountingBinder(KernelBinder):
    """Binds every operation to the reference, and counts what is called of it."""

    def __init__(self) -> None:
        super().__init__([("reference", _part("kernels", "reference", KernelProvider))])
        self.num_calls = 0

    def bind(self, spec: KernelSpec) -> Callable[..., Any]:
        kernel = super().bind(spec)

        def counted(*arguments: Any) -> Any:
            self.num_calls += 1
            return kernel(*arguments)

        return counted


def _part(kind: str, name: str, base: type[Any], **options: Any) -> Any:
    plugin = load(Registry().find(kind, name))
    part: Plugin = plugin(plugin.Config.model_validate(options))
    assert isinstance(part, base)
    return part


class Session:
    """A model over the reference attention's paged cache, one step after the other."""

    def __init__(self, module: CausalLM, device: torch.device) -> None:
        self.module, self.device = module, device
        self._backend: AttentionBackend = _part("attention", "sdpa", AttentionBackend, block_size=4)
        self._book = BlockBook(module.spec.attention, 4, 64)
        self._cache = self._backend.allocate(module.spec.attention, self._book.num_blocks, device)

    def step(self, new_ids: Mapping[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        """Scores [t, V] of each sequence's new tokens."""
        lengths = {s: len(ids) for s, ids in new_ids.items()}
        batch = self._book.batch(lengths, self.device)
        contexts = zip(batch.context_lengths, lengths.values(), strict=True)
        positions = [position for context, t in contexts for position in range(context, context + t)]
        step = self._backend.begin(self.module.spec.attention, batch, self._cache)
        logits = scores(self.module, [token for ids in new_ids.values() for token in ids], positions, step, self.device)
        return dict(zip(new_ids, logits.split(list(lengths.values())), strict=True))


def scores(
    module: CausalLM, ids: Sequence[int], positions: Sequence[int], step: Any, device: torch.device
) -> torch.Tensor:
    """Scores of every token of a step, [T, V]."""
    ids_T, positions_T = (torch.tensor(list(x), dtype=torch.int64, device=device) for x in (ids, positions))
    return module.logits(module.forward(ids_T, positions_T, step))


class ModelSuite(DeviceSuite):
    """The examination of a model plugin.

    loader: name of the loader that opens the author's checkpoint.
    """

    kind = "model"
    loader: ClassVar[str] = "safetensors"

    # --- what authors override ---------------------------------------------------------------------------------------

    @classmethod
    def make_checkpoint(cls, folder: Path) -> Path:
        """Write a tiny checkpoint of a few layers that the plugin builds, and return its path."""
        path = write_tiny_llama(folder)
        probe = cls.plugin_class().probe(ProbeContext(path=str(path), checkpoint=cls.opened(path)))
        if not probe.ok:
            not_run(f"it does not build the tiny Llama ({probe.reason}): override make_checkpoint")
        return path

    @classmethod
    def reference_logits(cls, checkpoint: Checkpoint, ids: Sequence[int]) -> torch.Tensor | None:
        """Scores of one sequence by somebody else's implementation in float32 or better, [T, V]; None for none."""
        is_tiny_llama = dict(checkpoint.config) == dict(TINY_LLAMA)
        return llama_logits(checkpoint, ids) if is_tiny_llama else None

    # --- what the tests use ------------------------------------------------------------------------------------------

    @classmethod
    def opened(cls, path: Path) -> Checkpoint:
        """The files at ``path``, by the loader."""
        loader: Loader = _part("loader", cls.loader, Loader)
        return loader.open(path)

    @pytest.fixture
    def checkpoint(self, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
        """The author's checkpoint, made once for each suite."""
        cls = type(self)
        if "_checkpoint" not in cls.__dict__:
            cls._checkpoint = cls.opened(cls.make_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))
        found: Checkpoint = cls.__dict__["_checkpoint"]
        return found

    _checkpoint: ClassVar[Checkpoint]

    @classmethod
    def built(
        cls,
        checkpoint: Checkpoint,
        dtype: str = "float32",
        *,
        quantizer: Quantizer | None = None,
        progress: Progress = silent,
        binder: KernelBinder | None = None,
    ) -> Any:
        """The module that the plugin builds; skips the test unless the dtype is claimed."""
        torch_dtype = cls.require_dtype(dtype)
        bind = (binder or cls.binder()).bind
        model: Model = cls.make()
        return model.build(checkpoint, BuildContext(cls.place().device, torch_dtype, bind, quantizer, progress))

    @classmethod
    def binder(cls) -> KernelBinder:
        """Binds every operation to the reference."""
        return KernelBinder([("reference", _part("kernels", "reference", KernelProvider))])

    @classmethod
    def whole(cls, module: Any, *sequences: Sequence[int]) -> list[torch.Tensor]:
        """Scores of packed whole sequences without a cache, [t, V] each."""
        lengths = [len(ids) for ids in sequences]
        ids = [token for one in sequences for token in one]
        positions = [position for t in lengths for position in range(t)]
        with torch.inference_mode():
            logits = scores(module, ids, positions, PlainStep(module.spec.attention, lengths), cls.place().device)
        return list(logits.split(lengths))

    @classmethod
    def tokens(cls, checkpoint: Checkpoint, length: int, seed: int = 0) -> list[int]:
        """Random token ids of the checkpoint's vocabulary."""
        model: Model = cls.make()
        vocab_size = model.describe(checkpoint.config, "float32").vocab_size
        drawn: list[int] = torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        return drawn

    @staticmethod
    def assert_close(found: torch.Tensor, wanted: torch.Tensor, dtype: str = "float32") -> None:
        """Within the published tolerance."""
        relative, absolute = TOLERANCES[dtype]
        torch.testing.assert_close(found.double().cpu(), wanted.double().cpu(), rtol=relative, atol=absolute)

    # --- the description ---------------------------------------------------------------------------------------------

    def test_describe_is_pure(self, checkpoint: Checkpoint) -> None:
        """The same configuration gives an equal description, and is left as it was."""
        model: Model = self.make()
        config = copy.deepcopy(dict(checkpoint.config))
        first, second = (model.describe(config, "float32") for _ in range(2))
        assert isinstance(first, ModelSpec)
        assert first == second
        assert config == dict(checkpoint.config), "the configuration was changed"
        assert first.architecture == checkpoint.architecture
        assert model.describe(config, "bfloat16").attention.dtype == "bfloat16", "attention has another dtype"

    def test_describe_allocates_little(self, checkpoint: Checkpoint) -> None:
        """A model of any size is described without its weights being made: here one of a million tokens."""
        model: Model = self.make()
        with Allocations() as allocations:
            model.describe({**checkpoint.config, "vocab_size": 1_000_000}, "float32")
        largest = allocations.largest_bytes
        assert largest <= MAX_DESCRIBE_BYTES, f"describe made a tensor of {largest} bytes"

    def test_describe_fits_what_is_built(self, checkpoint: Checkpoint) -> None:
        """Sizes, number of parameters and layers are those of the module, which carries the same description."""
        model: Model = self.make()
        spec = model.describe(checkpoint.config, "float32")
        module = self.built(checkpoint)
        assert module.spec == spec
        counted = sum(parameter.numel() for parameter in module.parameters())
        assert spec.num_parameters == counted, f"{spec.num_parameters} described, {counted} built"
        assert len(spec.attention.layers) <= spec.num_layers
        step = PlainStep(spec.attention, [3])
        ids_T, positions_T = torch.tensor([[1, 2, 3], [0, 1, 2]], device=self.place().device)
        with torch.inference_mode():
            hidden_TE = module(ids_T, positions_T, step)
            assert hidden_TE.shape == (3, spec.hidden_size)
            assert module.logits(hidden_TE).shape == (3, spec.vocab_size)
            assert module.logits(hidden_TE[:1]).shape == (1, spec.vocab_size)

    def test_an_unknown_architecture_is_refused(self, checkpoint: Checkpoint) -> None:
        """A configuration of an architecture that nobody knows raises UnknownArchitectureError."""
        model: Model = self.make()
        config = {**checkpoint.config, "architectures": ["SurelyNoSuchForCausalLM"], "model_type": "surely-no-such"}
        with pytest.raises(UnknownArchitectureError):
            model.describe(config, "float32")

    # --- building ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_build_gives_what_was_asked_for(self, checkpoint: Checkpoint, dtype: str) -> None:
        """A module in eval mode, every parameter trainable, in the dtype and on the device of the context."""
        module = self.built(checkpoint, dtype)
        assert isinstance(module, nn.Module)
        assert not module.training, "the module is in training mode"
        for name, parameter in module.named_parameters():
            assert parameter.dtype == getattr(torch, dtype), f"{name} is {parameter.dtype}"
            assert parameter.device == self.place().device, f"{name} is on {parameter.device}"
            assert parameter.requires_grad, f"{name} can't be trained"

    def test_parameters_are_its_own(self, checkpoint: Checkpoint) -> None:
        """Writing to the parameters, as training does, does not reach the files."""
        before = {name: checkpoint.tensor(name, torch.float32).clone() for name in checkpoint.names()}
        with torch.no_grad():
            for parameter in self.built(checkpoint).parameters():
                parameter.add_(1.0)
        changed = [name for name, old in before.items() if not torch.equal(checkpoint.tensor(name, torch.float32), old)]
        assert not changed, f"the checkpoint's own tensors were written to: {', '.join(changed)}"

    @pytest.mark.parametrize("place", ["first", "middle", "last"])
    def test_a_missing_tensor_is_named(self, checkpoint: Checkpoint, tmp_path: Path, place: str) -> None:
        """Files that lack a tensor raise MissingTensorError, which names it; it is not made up."""
        names = sorted(checkpoint.names())
        gone = names[{"first": 0, "middle": len(names) // 2, "last": -1}[place]]
        damaged = self.opened(rewrite_checkpoint(tmp_path / "model", checkpoint, without=[gone]))
        with pytest.raises(MissingTensorError) as caught:
            self.built(damaged)
        assert gone in str(caught.value), f"the error does not name {gone}: {caught.value}"

    def test_a_tensor_of_another_shape_is_an_error(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        """A tensor whose shape does not fit raises LoaderError, which names it."""
        name = next(name for name in sorted(checkpoint.names()) if len(checkpoint.shape(name)) == 2)
        cut = checkpoint.tensor(name, torch.float32)[:-1].clone()
        damaged = self.opened(rewrite_checkpoint(tmp_path / "model", checkpoint, extra={name: cut}))
        with pytest.raises(LoaderError) as caught:
            self.built(damaged)
        assert name in str(caught.value), f"the error does not name {name}: {caught.value}"

    def test_a_tensor_without_a_place_is_an_error(self, checkpoint: Checkpoint, tmp_path: Path) -> None:
        """Weights that the model would silently leave out raise LoaderError: the configuration is another model's."""
        more = sorted(checkpoint.names())[0].rpartition(".")[0] + ".surely_no_such"
        damaged = self.opened(rewrite_checkpoint(tmp_path / "model", checkpoint, extra={more: torch.ones(3)}))
        with pytest.raises(LoaderError) as caught:
            self.built(damaged)
        assert more in str(caught.value), f"the error does not name {more}: {caught.value}"

    def test_the_quantizer_sees_each_layer_once_with_its_weights(self, checkpoint: Checkpoint) -> None:
        """Every linear layer is offered to the quantizer once, loaded, under its name in the checkpoint."""
        quantizer = RecordingQuantizer()
        module = self.built(checkpoint, quantizer=quantizer)
        names = [name for name, _ in quantizer.seen]
        linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
        assert len(names) == len(set(names)) == len(linears), f"{len(linears)} linear layers, offered: {names}"
        stored = set(checkpoint.names())
        for name, weight in quantizer.seen:
            # A tied head has no tensor of its own.
            if f"{name}.weight" in stored and checkpoint.shape(f"{name}.weight") == tuple(weight.shape):
                wanted = checkpoint.tensor(f"{name}.weight", torch.float32)
                assert torch.equal(weight.cpu(), wanted), f"{name} was offered before its weights were loaded"
        known = [name for name in names if f"{name}.weight" in stored]
        assert len(known) >= len(names) // 2, f"names that are not the checkpoint's: {sorted(set(names) - set(known))}"

    def test_kernels_are_bound_when_it_is_built(self, checkpoint: Checkpoint) -> None:
        """A step looks up no kernel: the binder is asked while the model is built, and never after."""
        binder = self.binder()
        module = self.built(checkpoint, binder=binder)
        asked = binder.num_lookups
        self.whole(module, self.tokens(checkpoint, 5))
        assert binder.num_lookups == asked, f"{binder.num_lookups - asked} look-ups in one step"

    def test_progress_reaches_its_end(self, checkpoint: Checkpoint) -> None:
        """Loading tells how far it is, never backwards, up to the whole."""
        seen: list[tuple[int, int | None]] = []

        def watch(what: str, done: int, total: int | None, unit: str = "bytes") -> None:
            seen.append((done, total))

        self.built(checkpoint, progress=watch)
        assert seen, "nothing is told while weights are loaded"
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1][0] == seen[-1][1], f"it ends at {seen[-1][0]} of {seen[-1][1]}"

    # --- scores ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_scores_are_finite(self, checkpoint: Checkpoint, dtype: str) -> None:
        """Scores are finite, [N, V], in the parameter dtype, for one token and for many."""
        module = self.built(checkpoint, dtype)
        for length in (1, 2, 20):
            (logits,) = self.whole(module, self.tokens(checkpoint, length))
            assert logits.shape == (length, module.spec.vocab_size)
            assert logits.dtype == getattr(torch, dtype), f"scores are {logits.dtype}"
            assert torch.isfinite(logits).all(), "a score is an infinity or a NaN"

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_scores_equal_the_reference(self, checkpoint: Checkpoint, dtype: str) -> None:
        """Scores equal those of another implementation of the architecture."""
        ids = self.tokens(checkpoint, 20)
        wanted = self.reference_logits(checkpoint, ids)
        if wanted is None:
            pytest.skip("not claimed: the author gives no reference_logits for this checkpoint")
        (found,) = self.whole(self.built(checkpoint, dtype), ids)
        self.assert_close(found, wanted, dtype)

    def test_most_likely_tokens_are_those_of_the_scores(self, checkpoint: Checkpoint) -> None:
        """A module that is a FindsMostLikely gives the best score of each row and its token."""
        module: Any = self.built(checkpoint)
        is_finder = isinstance(module, FindsMostLikely)
        if not is_finder:
            pytest.skip("not claimed: most likely tokens without all scores")
        ids_T = torch.tensor(self.tokens(checkpoint, 20), device=self.place().device)
        with torch.inference_mode():
            step = PlainStep(module.spec.attention, [len(ids_T)])
            hidden_TE = module(ids_T, torch.arange(len(ids_T), device=ids_T.device), step)
            assert module.most_likely(hidden_TE) is None, "nothing has prepared it"
            module.prepare_most_likely()
            found = module.most_likely(hidden_TE)
            if found is None:
                pytest.skip("not claimed: most likely tokens without all scores, with these kernels and of these sizes")
            best_T, token_T = found
            logits_TV = module.logits(hidden_TE)
        assert token_T.tolist() == logits_TV.argmax(dim=-1).tolist()
        self.assert_close(best_T, logits_TV.amax(dim=-1))

    @pytest.mark.parametrize("split", SPLITS, ids=lambda split: "+".join(map(str, split)))
    def test_a_prompt_may_be_cut_anywhere(self, checkpoint: Checkpoint, split: tuple[int, ...]) -> None:
        """Chunk by chunk or token by token over a paged cache, scores are those of the whole sequence."""
        module, ids = self.built(checkpoint), self.tokens(checkpoint, 13)
        session, parts, start = Session(module, self.place().device), [], 0
        with torch.inference_mode():
            for count in split:
                parts.append(session.step({0: ids[start : start + count]})[0])
                start += count
        self.assert_close(torch.cat(parts), self.whole(module, ids)[0])

    def test_packing_changes_nothing(self, checkpoint: Checkpoint) -> None:
        """Each sequence scores as it does alone, in whatever company and order."""
        module = self.built(checkpoint)
        sequences = [self.tokens(checkpoint, length, seed=length) for length in (7, 1, 12)]
        alone = [self.whole(module, ids)[0] for ids in sequences]
        for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
            packed = self.whole(module, *(sequences[index] for index in order))
            for index, found in zip(order, packed, strict=True):
                self.assert_close(found, alone[index])

    def test_decodes_and_prefills_share_a_step(self, checkpoint: Checkpoint) -> None:
        """Sequences at different positions, one decoding and one at its prompt, score as they do alone."""
        module, device = self.built(checkpoint), self.place().device
        first, second = self.tokens(checkpoint, 9, seed=1), self.tokens(checkpoint, 8, seed=2)
        session = Session(module, device)
        with torch.inference_mode():
            session.step({0: first[:7]})
            mixed = [session.step({1: second[:5], 0: first[7:8]}), session.step({0: first[8:], 1: second[5:]})]
        self.assert_close(torch.cat([step[0] for step in mixed]), self.whole(module, first)[0][7:])
        self.assert_close(torch.cat([step[1] for step in mixed]), self.whole(module, second)[0])

    def test_a_cache_makes_no_difference(self, checkpoint: Checkpoint) -> None:
        """The same tokens through the same backend, with a cache and with none, score the same."""
        module, device = self.built(checkpoint), self.place().device
        ids = self.tokens(checkpoint, 12)
        backend: AttentionBackend = _part("attention", "sdpa", AttentionBackend)
        with torch.inference_mode():
            step = backend.begin(module.spec.attention, whole_batch([len(ids)], device), None)
            without = scores(module, ids, range(len(ids)), step, device)
            behind = Session(module, device).step({0: ids})[0]
        self.assert_close(behind, without)

    def test_two_runs_are_the_same_to_the_last_bit(self, checkpoint: Checkpoint) -> None:
        """Two modules that are built alike, and one that is called twice, give the same bits."""
        ids = self.tokens(checkpoint, 11)
        module, other = self.built(checkpoint), self.built(checkpoint)
        first = self.whole(module, ids)[0]
        assert torch.equal(self.whole(module, ids)[0], first), "a second run gave other bits"
        assert torch.equal(self.whole(other, ids)[0], first), "a second module gave other bits"

    def test_kernels_are_swapped_under_it(self, checkpoint: Checkpoint) -> None:
        """As in a running engine: a second module with kernels of its own, on the first one's weights, takes over the
        cache, and the first one takes it back. Each calls its own kernels, and the scores stay what they were."""
        binders = CountingBinder(), CountingBinder()
        first, second = (self.built(checkpoint, binder=binder) for binder in binders)
        share_parameters(first, second)
        ids = self.tokens(checkpoint, 15)
        session, parts = Session(first, self.place().device), []
        with torch.inference_mode():
            for start, own in ((0, 0), (6, 1), (9, 0), (12, 1), (13, 0)):
                end = {0: 6, 6: 9, 9: 12, 12: 13, 13: 15}[start]
                before = [binder.num_calls for binder in binders]
                session.module = (first, second)[own]
                parts.append(session.step({0: ids[start:end]})[0])
                calls = [binder.num_calls - count for binder, count in zip(binders, before, strict=True)]
                # An architecture of somebody else's library may have its operations built in.
                assert calls[own] > 0 or not binders[own].bindings, (
                    "a module that was swapped in does not call the kernels it was built with"
                )
                assert calls[1 - own] == 0, "a module that was swapped in calls the kernels of the one before"
        self.assert_close(torch.cat(parts), self.whole(self.built(checkpoint), ids)[0])

    def test_inputs_are_left_alone(self, checkpoint: Checkpoint) -> None:
        """Neither ids nor positions are written to."""
        module = self.built(checkpoint)
        ids_T = torch.tensor(self.tokens(checkpoint, 6), device=self.place().device)
        positions_T = torch.arange(6, device=self.place().device)
        before = ids_T.clone(), positions_T.clone()
        with torch.inference_mode():
            module(ids_T, positions_T, PlainStep(module.spec.attention, [6]))
        assert torch.equal(ids_T, before[0])
        assert torch.equal(positions_T, before[1])

    # --- training ----------------------------------------------------------------------------------------------------

    def test_every_parameter_gets_a_gradient(self, checkpoint: Checkpoint) -> None:
        """Behind the loss of a few tokens, every parameter has a finite gradient, and every matrix one that is not
        zero."""
        module, device = self.built(checkpoint), self.place().device
        ids = self.tokens(checkpoint, 16)
        logits = scores(module, ids[:-1], range(15), PlainStep(module.spec.attention, [9, 6]), device)
        nn.functional.cross_entropy(logits, torch.tensor(ids[1:], device=device)).backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, f"no gradient reaches {name}"
            assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} has an infinity or a NaN"
            # A bias of keys that are not rotated moves all scores alike: its gradient is rightly zero.
            assert parameter.dim() < 2 or parameter.grad.any(), f"the gradient of {name} is zero"

    def test_a_step_along_the_gradient_lowers_the_loss(self, checkpoint: Checkpoint) -> None:
        """Gradients point where they should: a small step down them lowers the loss by what they promise."""
        module, device = self.built(checkpoint), self.place().device
        ids = self.tokens(checkpoint, 16)

        def loss() -> torch.Tensor:
            logits = scores(module, ids[:-1], range(15), PlainStep(module.spec.attention, [15]), device)
            return nn.functional.cross_entropy(logits.double(), torch.tensor(ids[1:], device=device))

        before = loss()
        before.backward()
        gradients = [(p, p.grad) for p in module.parameters() if p.grad is not None]
        squared = float(sum(gradient.double().square().sum() for _, gradient in gradients))
        with torch.no_grad():
            for parameter, gradient in gradients:
                parameter.sub_(gradient, alpha=1e-3 / squared)
            gained = float(before.detach() - loss())
        assert 0.5e-3 <= gained <= 1.5e-3, f"a step that promises 0.001 less loss gives {gained:.3g} less"
