"""Runs calibration windows through a model layer by layer, and packs each layer before its output is made.

Shapes: N tokens of all windows; T tokens of a batch of windows; E hidden size; O, I of a linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn

from drivetrain.calibration.groups import InputGroup, fold, input_groups
from drivetrain.calibration.plan import CalibrationPlan, wants_gram
from drivetrain.calibration.state import FinishedLayer, RunFolder
from drivetrain.calibration.statistics import Collectors
from drivetrain.contracts.attention import AttentionBackend, AttentionBatch, AttentionStep
from drivetrain.contracts.model import LayeredModel
from drivetrain.contracts.packed import PackedWeight
from drivetrain.contracts.quantizer import Calibrates, InputStatistics, Quantizer
from drivetrain.contracts.source import Progress
from drivetrain.errors import CalibrationError, ConfigError
from drivetrain.packed import PackedLinear, decode
from drivetrain.packed.conversion import Conversion


@dataclass(frozen=True)
class Batches:
    """How windows lie in the file of hidden states: one after the other, some at a time.

    windows: token ids of each window.
    """

    windows: Sequence[Sequence[int]]
    per_batch: int

    @property
    def num_tokens(self) -> int:
        return sum(len(window) for window in self.windows)

    def __iter__(self) -> Iterator[tuple[slice, list[Sequence[int]]]]:
        """Rows of a batch, and its windows."""
        start = 0
        for first in range(0, len(self.windows), self.per_batch):
            windows = list(self.windows[first : first + self.per_batch])
            rows = slice(start, start + sum(len(window) for window in windows))
            start = rows.stop
            yield rows, windows


class LayerByLayer:
    """One run over all decoder layers.

    conversion: says which quantizer has which layer, and checks what goes in.
    """

    def __init__(
        self,
        model: LayeredModel,
        conversion: Conversion,
        attention: AttentionBackend,
        device: torch.device,
        dtype: torch.dtype,
        run: RunFolder,
        progress: Progress,
    ) -> None:
        self._model, self._conversion, self._attention = model, conversion, attention
        self._device, self._dtype, self._run, self._progress = device, dtype, run, progress
        self._done = self._total = 0

    @torch.no_grad()
    def calibrate(self, windows: Sequence[Sequence[int]], plan: CalibrationPlan) -> None:
        """Pack every decoder layer that is not finished yet, by what goes into it."""
        batches = Batches(windows, plan.windows_per_batch)
        shape = (batches.num_tokens, self._model.spec.hidden_size)
        first, count = self._run.num_finished(), self._model.spec.num_layers
        self._total, self._done = 2 * count * batches.num_tokens, 2 * first * batches.num_tokens
        self._tell(0)
        if first == 0:
            self._embed(batches, self._run.hidden(0, shape, self._dtype))
        for layer in range(first, count):
            before = self._run.hidden(layer, shape, self._dtype)
            after = self._run.hidden(layer + 1, shape, self._dtype)
            finished = self._one_layer(layer, batches, before, after)
            self._run.settle_hidden(layer + 1)
            self._run.save(layer, finished)

    @torch.no_grad()
    def round_all(self) -> None:
        """Pack every decoder layer that is not finished yet, by its weights alone."""
        count = self._model.spec.num_layers
        for number in range(self._run.num_finished(), count):
            self._progress("quantizing", number, count, "layers")
            module, prefix = self._model.load_layer(number), self._model.layer_name(number)
            groups = input_groups(module, self._model.spec.attention.layers[number])
            packed = {}
            for name in (name for group in groups for name in group.linears):
                found = self._rounded(f"{prefix}.{name}", _linear(module, name))
                if found is not None:
                    packed[f"{prefix}.{name}"] = found
            self._run.save(number, FinishedLayer(packed, {}))
        self._progress("quantizing", count, count, "layers")

    @torch.no_grad()
    def round_outer(self) -> None:
        """Pack the layers outside of the decoder layers whose quantizer needs no inputs; those that do leave them."""
        for name in self._model.outer_linears():
            if self._run.has(name):
                continue
            quantizer = self._conversion.quantizer_for(name)
            if isinstance(quantizer, Calibrates):
                continue
            found = self._rounded(name, self._model.load_linear(name))
            if found is not None:
                self._run.save(name, FinishedLayer({name: found}, {}))

    # --- steps -------------------------------------------------------------------------------------------------------

    def _embed(self, batches: Batches, hidden_NE: torch.Tensor) -> None:
        every = list(batches)
        ids = (torch.tensor([t for window in windows for t in window]) for _, windows in every)
        for (rows, _), x_TE in zip(every, self._model.embed(list(ids)), strict=True):
            hidden_NE[rows] = x_TE.to(hidden_NE.device)

    def _one_layer(
        self, number: int, batches: Batches, before_NE: torch.Tensor, after_NE: torch.Tensor
    ) -> FinishedLayer:
        module, prefix = self._model.load_layer(number), self._model.layer_name(number)
        groups = input_groups(module, self._model.spec.attention.layers[number])
        quantizers = {
            name: self._conversion.admit(f"{prefix}.{name}", _linear(module, name), calibrates=True)
            for group in groups
            for name in group.linears
        }
        statistics = self._collect(number, module, groups, quantizers, batches, before_NE)
        changed = self._fold(module, groups, quantizers, statistics)
        packed = {}
        for group, known in zip(groups, statistics, strict=True):
            for name in group.linears:
                found = self._packed(f"{prefix}.{name}", _linear(module, name), quantizers[name], known)
                if found is not None:
                    packed[f"{prefix}.{name}"] = found.to(torch.device("cpu"))
        for rows, windows in batches:
            after_NE[rows] = self._run_layer(number, module, before_NE[rows], windows).to(after_NE.device)
            self._tell(rows.stop - rows.start)
        self._check_output(prefix, after_NE)
        kept = {f"{prefix}.{name}": module.get_parameter(name).detach().cpu() for name in sorted(changed)}
        return FinishedLayer(
            packed, {name: t for name, t in kept.items() if name.removesuffix(".weight") not in packed}
        )

    def _collect(
        self,
        number: int,
        module: nn.Module,
        groups: Sequence[InputGroup],
        quantizers: Mapping[str, Quantizer],
        batches: Batches,
        before_NE: torch.Tensor,
    ) -> list[InputStatistics]:
        grams = [any(wants_gram(quantizers[name]) for name in group.linears) for group in groups]
        collectors = Collectors(module, self._model.layer_name(number), groups, grams)
        with collectors.watching():
            for rows, windows in batches:
                self._run_layer(number, module, before_NE[rows], windows)
                self._tell(rows.stop - rows.start)
        return collectors.statistics()

    def _fold(
        self,
        module: nn.Module,
        groups: Sequence[InputGroup],
        quantizers: Mapping[str, Quantizer],
        statistics: list[InputStatistics],
    ) -> set[str]:
        """Fold factors where the quantizer of a whole group has them; ``statistics`` become those of the divided
        inputs. Returns the names of all parameters that have changed."""
        changed: set[str] = set()
        found: list[torch.Tensor | None] = []
        for group, known in zip(groups, statistics, strict=True):
            found.append(self._factors(module, group, quantizers, known))
        for place, (group, factors_I) in enumerate(zip(groups, found, strict=True)):
            if factors_I is None:
                continue
            used_I = fold(module, group, factors_I, self._model.norm_offset)
            statistics[place] = statistics[place].divided(used_I)
            assert group.source is not None
            changed |= {f"{name}.weight" for name in group.linears}
            source = group.source.name
            changed |= {source} if group.source.is_norm else {f"{source}.weight"}
            if not group.source.is_norm and _linear(module, source).bias is not None:
                changed.add(f"{source}.bias")
        return changed

    def _factors(
        self,
        module: nn.Module,
        group: InputGroup,
        quantizers: Mapping[str, Quantizer],
        statistics: InputStatistics,
    ) -> torch.Tensor | None:
        chosen = quantizers[group.linears[0]]
        shares = all(quantizers[name] is chosen for name in group.linears)
        if group.source is None or not shares or not isinstance(chosen, Calibrates):
            return None
        known = replace(
            statistics,
            mean_abs_I=group.source.shared(statistics.mean_abs_I),
            max_abs_I=group.source.shared(statistics.max_abs_I, mean=False),
        )
        weights = {name: _linear(module, name).weight.float() for name in group.linears}
        factors_I = chosen.input_factors(weights, known)
        if factors_I is not None and not bool((torch.isfinite(factors_I) & (factors_I > 0)).all()):
            raise CalibrationError(
                "the factors of an input are not all positive numbers", where=", ".join(group.linears)
            )
        return factors_I

    def _packed(
        self, name: str, linear: nn.Linear, quantizer: Quantizer, statistics: InputStatistics
    ) -> PackedWeight | None:
        """The packed weight of a layer, whose own weight becomes what it stands for; None for one that stays."""
        if not isinstance(quantizer, Calibrates):
            packed = self._converted(name, linear, quantizer)
        else:
            packed = quantizer.pack(name, linear.weight.float(), statistics)
            self._conversion.enter(name, linear, PackedLinear(packed))
        if packed is not None:
            linear.weight.copy_(decode(packed, torch.promote_types(linear.weight.dtype, torch.float32)))
        return packed

    def _rounded(self, name: str, linear: nn.Linear) -> PackedWeight | None:
        packed = self._converted(name, linear, self._conversion.admit(name, linear))
        return None if packed is None else packed.to(torch.device("cpu"))

    def _converted(self, name: str, linear: nn.Linear, quantizer: Quantizer) -> PackedWeight | None:
        module = quantizer.convert(name, linear)
        self._conversion.enter(name, linear, module)
        if module is linear:
            return None
        if not isinstance(module, PackedLinear):
            raise ConfigError(
                "the quantizer makes modules of its own of which no file can be written",
                where=name,
                found=type(module).__name__,
                allowed="PackedLinear",
            )
        return module.packed

    def _run_layer(
        self, number: int, module: nn.Module, x_TE: torch.Tensor, windows: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        lengths = [len(window) for window in windows]
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(self._device)
        step = self._step(lengths)
        return self._model.run_layer(module, number, x_TE.to(self._device), positions_T, step)

    def _step(self, lengths: Sequence[int]) -> AttentionStep:
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(self._device)
        kv_lengths = torch.tensor(lengths, dtype=torch.int32, device=self._device)
        batch = AttentionBatch(lengths, [0] * len(lengths), starts, kv_lengths)
        return self._attention.begin(self._model.spec.attention, batch, None)

    def _check_output(self, prefix: str, after_NE: torch.Tensor) -> None:
        wrong = sum(int((~torch.isfinite(rows)).sum()) for rows in after_NE.split(1024))
        if wrong:
            raise CalibrationError(
                f"{wrong} of the {after_NE.numel()} numbers that come out of the layer are NaN or infinite",
                where=prefix,
                hint="Run in another precision (--precision fp32), or check the model with drivetrain generate.",
            )

    def _tell(self, num_tokens: int) -> None:
        self._done += num_tokens
        self._progress("calibrating", self._done, self._total, "tokens")


def _linear(module: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, module.get_submodule(name))
