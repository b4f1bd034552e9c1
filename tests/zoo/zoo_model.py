"""Model plugins with one fault each, over the built-in decoder.

Shapes: T tokens of a step; E hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from drivetrain.contracts.attention import AttentionStep
from drivetrain.contracts.kernels import KernelSpec
from drivetrain.contracts.loader import Checkpoint, TokenizerData
from drivetrain.contracts.model import BuildContext, CausalLM, ModelSpec
from drivetrain.contracts.plugin import Plugin
from drivetrain.contracts.quantizer import Quantizer
from drivetrain.plugins.model.decoder import DecoderModel

Forward = Callable[[torch.Tensor, torch.Tensor, AttentionStep], torch.Tensor]


class FaultyForward(DecoderModel):
    """A decoder whose forward goes through ``faulty``."""

    def build(self, checkpoint: Checkpoint, context: BuildContext) -> CausalLM:
        module: Any = super().build(checkpoint, context)
        plain: Forward = module.forward

        def forward(ids_T: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep) -> torch.Tensor:
            return self.faulty(plain, ids_T, positions_T, step, context)

        module.forward = forward
        built: CausalLM = module
        return built

    def faulty(
        self,
        plain: Forward,
        ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        step: AttentionStep,
        context: BuildContext,
    ) -> torch.Tensor:
        return plain(ids_T, positions_T, step)


class CountsRows(FaultyForward):
    """Takes a token's row in the step for its position."""

    def faulty(
        self, plain: Forward, ids_T: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep, context: BuildContext
    ) -> torch.Tensor:
        return plain(ids_T, torch.arange(len(ids_T), device=ids_T.device), step)


class DecodesOnePositionOff(FaultyForward):
    """Steps of a single token are one position late."""

    def faulty(
        self, plain: Forward, ids_T: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep, context: BuildContext
    ) -> torch.Tensor:
        return plain(ids_T, positions_T + 1 if len(ids_T) == 1 else positions_T, step)


class LooksForACache(FaultyForward):
    """Does something else when there is a cache behind the step."""

    def faulty(
        self, plain: Forward, ids_T: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep, context: BuildContext
    ) -> torch.Tensor:
        hidden_TE = plain(ids_T, positions_T, step)
        return hidden_TE if getattr(step, "_cache", None) is None else hidden_TE * 1.05


class MixesThePacked(FaultyForward):
    """Lets a little of the whole batch into every row."""

    def faulty(
        self, plain: Forward, ids_T: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep, context: BuildContext
    ) -> torch.Tensor:
        hidden_TE = plain(ids_T, positions_T, step)
        return hidden_TE + 0.05 * hidden_TE.mean(0)


class TrainsItsHeadOnly(FaultyForward):
    """Cuts the graph below the head."""

    def faulty(
        self, plain: Forward, ids_T: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep, context: BuildContext
    ) -> torch.Tensor:
        return plain(ids_T, positions_T, step).detach()


class BindsAtEveryStep(FaultyForward):
    """Looks a kernel up while it runs."""

    def faulty(
        self, plain: Forward, ids_T: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep, context: BuildContext
    ) -> torch.Tensor:
        context.bind(KernelSpec("silu_mul", ids_T.device.type, "float32"))
        return plain(ids_T, positions_T, step)


class _OtherCheckpoint(Checkpoint):
    """Another checkpoint, a little different."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.path = checkpoint.path
        self.config: Mapping[str, Any] = checkpoint.config
        self.generation_config = checkpoint.generation_config

    def names(self) -> Sequence[str]:
        return self._checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.shape(name)

    def stored_bytes(self) -> int:
        return self._checkpoint.stored_bytes()

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return self._checkpoint.tensor(name, dtype)

    def tokenizer(self) -> TokenizerData:
        return self._checkpoint.tokenizer()


class _FilledUp(_OtherCheckpoint):
    """Has a tensor of ones for every name that the tiny Llama could need."""

    def __init__(self, checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(checkpoint)
        self._wanted = wanted

    def names(self) -> Sequence[str]:
        return sorted({*self._wanted, *self._checkpoint.names()})

    def shape(self, name: str) -> tuple[int, ...]:
        return super().shape(name) if name in self._checkpoint.names() else self._wanted[name]

    def tensor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        if name in self._checkpoint.names():
            return super().tensor(name, dtype)
        return torch.ones(self._wanted[name], dtype=dtype)


class _WithoutMore(_OtherCheckpoint):
    def names(self) -> Sequence[str]:
        return [name for name in self._checkpoint.names() if "no_such" not in name]


class MakesUpMissingTensors(DecoderModel):
    """Fills in what the files lack."""

    def build(self, checkpoint: Checkpoint, context: BuildContext) -> CausalLM:
        hidden, vocab = checkpoint.config["hidden_size"], checkpoint.config["vocab_size"]
        wanted: dict[str, tuple[int, ...]] = {"lm_head.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
        return super().build(_FilledUp(checkpoint, wanted), context)


class IgnoresMoreTensors(DecoderModel):
    """Leaves out what it has no place for, and says nothing."""

    def build(self, checkpoint: Checkpoint, context: BuildContext) -> CausalLM:
        return super().build(_WithoutMore(checkpoint), context)


class AnotherRopeBase(DecoderModel):
    """Rotates with the usual base, whatever the configuration says."""

    def build(self, checkpoint: Checkpoint, context: BuildContext) -> CausalLM:
        changed = _OtherCheckpoint(checkpoint)
        rope = {"rope_theta": 10_000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
        changed.config = {**checkpoint.config, **rope}
        return super().build(changed, context)


class BuiltInTrainMode(DecoderModel):
    """Hands the module over in training mode."""

    def build(self, checkpoint: Checkpoint, context: BuildContext) -> CausalLM:
        module: Any = super().build(checkpoint, context)
        built: CausalLM = module.train()
        return built


class MiscountsParameters(DecoderModel):
    """Forgets the head when it counts."""

    def describe(self, config: Mapping[str, Any], dtype: str) -> ModelSpec:
        spec = super().describe(config, dtype)
        return dataclasses.replace(spec, num_parameters=spec.num_parameters - spec.vocab_size * spec.hidden_size)


class DescribesByMaking(DecoderModel):
    """Makes the embeddings to learn their shape."""

    def describe(self, config: Mapping[str, Any], dtype: str) -> ModelSpec:
        made = torch.empty(config["vocab_size"], config["hidden_size"])
        return dataclasses.replace(super().describe(config, dtype), vocab_size=made.shape[0])


class QuantizesBeforeLoading(DecoderModel):
    """Shows the quantizer layers whose weights are not there yet."""

    def build(self, checkpoint: Checkpoint, context: BuildContext) -> CausalLM:
        module: Any = super().build(checkpoint, dataclasses.replace(context, quantizer=None))
        quantizer: Quantizer | None = context.quantizer
        for name, part in list(module.named_modules()):
            if quantizer is not None and isinstance(part, torch.nn.Linear):
                empty = torch.nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
                quantizer.convert(name, empty)
        built: CausalLM = module
        return built


class FindsTheLeastLikely(DecoderModel):
    """Says that it finds greedy tokens without all scores, and takes the wrong end."""

    def build(self, checkpoint: Checkpoint, context: BuildContext) -> CausalLM:
        module: Any = super().build(checkpoint, context)
        is_prepared = []
        module.prepare_most_likely = lambda: is_prepared.append(True)
        module.most_likely = lambda hidden_NE: module.logits(hidden_NE).min(dim=-1) if is_prepared else None
        built: CausalLM = module
        return built


class KeepsItsFirstKernels(DecoderModel):
    """Binds each kernel once a process, and gives it to every module that it builds later."""

    _bound: ClassVar[dict[str, Callable[..., Any]]] = {}

    def build(self, checkpoint: Checkpoint, context: BuildContext) -> CausalLM:
        def bind(spec: KernelSpec) -> Callable[..., Any]:
            return self._bound.setdefault(repr(spec), context.bind(spec))

        return super().build(checkpoint, dataclasses.replace(context, bind=bind))


ZOO: dict[type[Plugin], str] = {
    CountsRows: "test_a_prompt_may_be_cut_anywhere",
    DecodesOnePositionOff: "test_a_prompt_may_be_cut_anywhere",
    LooksForACache: "test_a_cache_makes_no_difference",
    MixesThePacked: "test_packing_changes_nothing",
    TrainsItsHeadOnly: "test_every_parameter_gets_a_gradient",
    BindsAtEveryStep: "test_kernels_are_bound_when_it_is_built",
    MakesUpMissingTensors: "test_a_missing_tensor_is_named",
    IgnoresMoreTensors: "test_a_tensor_without_a_place_is_an_error",
    AnotherRopeBase: "test_scores_equal_the_reference",
    BuiltInTrainMode: "test_build_gives_what_was_asked_for",
    MiscountsParameters: "test_describe_fits_what_is_built",
    DescribesByMaking: "test_describe_allocates_little",
    FindsTheLeastLikely: "test_most_likely_tokens_are_those_of_the_scores",
    KeepsItsFirstKernels: "test_kernels_are_swapped_under_it",
    QuantizesBeforeLoading: "test_the_quantizer_sees_each_layer_once_with_its_weights",
}
"""Broken model plugin -> the test that has to catch it."""
