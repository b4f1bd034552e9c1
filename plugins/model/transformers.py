"""Any causal architecture of the transformers library that attends plainly, through its attention interface.

The library's own module does everything but attention, which it hands to a function registered here. Nothing is taken
on trust: :meth:`TransformersModel.describe` runs the architecture once on the meta device and reads from its own calls
how each layer attends, and :meth:`TransformersModel.build` compares a few tokens, packed as serving packs them, with
the library's own result. What is not plain attention is refused with the reason.

Shapes: T tokens of a step, packed flat over sequences; E hidden size; V vocabulary; N rows whose logits are wanted; H
query heads; G key/value heads; D head size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from drivetrain.contracts.attention import AttentionSpec, AttentionStep, LayerAttention
from drivetrain.contracts.loader import Checkpoint
from drivetrain.contracts.model import BuildContext, CausalLM, Model, ModelSpec
from drivetrain.contracts.plugin import Probe, ProbeContext, Tier
from drivetrain.contracts.quantizer import DecidesTables, TakesStored
from drivetrain.errors import LoaderError, MissingDependencyError, MissingTensorError, UnknownArchitectureError
from drivetrain.packed import PackedEmbedding, PackedLinear

if TYPE_CHECKING:
    import types

    from drivetrain.contracts.packed import PackedWeight

_IMPLEMENTATION = "drivetrain"
_TRACE = "drivetrain_trace"

_SUFFIXES = ("ForCausalLM", "LMHeadModel")
"""How the library names its causal language models."""

_NOT_PLAIN = ("s_aux", "sinks", "position_bias", "attn_bias", "alibi", "indices", "block_indices")
"""Arguments of the attention interface that change the scores in ways no backend here knows."""

_PROBE_LENGTHS = (8, 5)
"""Sequences of the check in build: two, so that a model that ignores positions or mixes tokens is found out."""


def _library() -> types.ModuleType:
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependencyError("transformers", needed_by="the model plugin 'transformers'", extra="transformers")
    import transformers

    return transformers


def _refused(architecture: str, reason: str) -> UnknownArchitectureError:
    return UnknownArchitectureError(
        f"{architecture} can't be run through the attention interface of transformers: {reason}",
        where="model/transformers",
        allowed="architectures in which each layer does plain causal attention and nothing else mixes tokens",
    )


# --- the attention function ----------------------------------------------------------------------------------------


class _Current:
    """The step that a model is in. Every attention module of the model holds it: not all architectures pass extra
    arguments of forward on to their attention."""

    step: AttentionStep | None = None


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    **rest: object,
) -> tuple[torch.Tensor, None]:
    """The registered function: [1, heads, T, D] in, [1, T, H, D] out. Scale, window and cap are in the step's spec."""
    current: Any = module.drivetrain_current
    q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (query, key, value))
    return current.step.attend(module.layer_idx, q_THD, k_TGD, v_TGD).unsqueeze(0), None


@dataclass(frozen=True)
class _MaskCall:
    """What the library asked a mask to be; it stands in for the mask while tracing."""

    window: int | None
    function: Any


@dataclass(frozen=True)
class _AttentionCall:
    """One call of attention while tracing."""

    layer: int | None
    layer_attention: LayerAttention
    mask: object
    is_plain: bool
    why: str


def _trace_mask(**arguments: Any) -> _MaskCall:
    return _MaskCall(arguments.get("local_size"), arguments["mask_function"])


def _trace_attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: object, **rest: Any
) -> tuple[torch.Tensor, None]:
    why = ""
    if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
        why = f"keys and values differ in size ({tuple(key.shape)} and {tuple(value.shape)})"
    given = [name for name in _NOT_PLAIN if rest.get(name) is not None]
    if given:
        why = f"its attention takes {', '.join(given)}"
    if rest.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        why = "its attention is not causal"
    scale = rest.get("scaling")
    attention = LayerAttention(
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_size=query.shape[-1],
        scale=float(scale if scale is not None else query.shape[-1] ** -0.5),
        window=attention_mask.window if isinstance(attention_mask, _MaskCall) else None,
        soft_cap=rest.get("softcap"),
    )
    calls: list[_AttentionCall] = module.drivetrain_current.calls  # type: ignore[union-attr,assignment]
    calls.append(_AttentionCall(getattr(module, "layer_idx", None), attention, attention_mask, not why, why))
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]), None


class _Tracing:
    """Stands where the current step stands, and collects the calls."""

    def __init__(self) -> None:
        self.calls: list[_AttentionCall] = []


def _register() -> None:
    """Make our functions known to the library. Registering twice changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    # No mask function for _IMPLEMENTATION: the library then makes no mask at all, and passes None.
    AttentionInterface.register(_IMPLEMENTATION, _attend)
    AttentionInterface.register(_TRACE, _trace_attend)
    AttentionMaskInterface.register(_TRACE, _trace_mask)


def _attach(model: nn.Module, current: object) -> None:
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            module.drivetrain_current = current  # type: ignore[assignment]


# --- describing ----------------------------------------------------------------------------------------------------


def _library_config(keys: Mapping[str, Any]) -> Any:
    """The library's configuration object. Raises UnknownArchitectureError."""
    library = _library()
    architecture = str((keys.get("architectures") or ["unknown"])[0])
    model_type = str(keys.get("model_type"))
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) != architecture:
        raise UnknownArchitectureError(
            "the transformers library has no such causal language model",
            where="config.json",
            found=f"model_type {model_type!r}, architecture {architecture!r}",
            hint=f"Installed: transformers {library.__version__}; a newer one may know it.",
        )
    rest = {key: value for key, value in keys.items() if key != "model_type"}
    try:
        return library.AutoConfig.for_model(model_type, **rest)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise LoaderError(f"transformers refuses the configuration: {error}", where="config.json") from error


def _mask_is(call: _MaskCall) -> bool:
    """Whether the mask function is the plain causal one of the window it claims: tried on positions around its edge."""
    edge = call.window or 4
    places = torch.tensor(sorted({0, 1, 2, edge - 1, edge, edge + 1, 2 * edge, 3 * edge + 1}))
    queries, keys = places[:, None], places[None, :]
    expected = keys <= queries
    if call.window is not None:
        expected &= keys > queries - call.window
    zero = torch.tensor(0)
    try:
        found = call.function(zero, zero, queries, keys)
    except RuntimeError:
        return False  # it holds tensors of the traced forward: more than positions decide
    return bool(torch.equal(found.expand(expected.shape), expected))


def _trace(architecture: str, config: Any) -> tuple[Any, list[_AttentionCall]]:
    """The model on the meta device, and the calls of attention that one forward makes."""
    library = _library()
    _register()
    tracing = _Tracing()
    # bfloat16 because the library's grouped products of experts exist on the meta device in that type only.
    try:
        with torch.device("meta"):
            model = library.AutoModelForCausalLM.from_config(config, attn_implementation=_TRACE, dtype=torch.bfloat16)
            model.eval()
            _attach(model, tracing)
            ids = torch.zeros(1, 4, dtype=torch.long)
            # An attention mask of ones keeps the library from looking at the values of the positions.
            model.base_model(
                input_ids=ids,
                position_ids=torch.arange(4)[None],
                attention_mask=torch.ones_like(ids),
                use_cache=False,
            )
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, KeyError, ImportError) as error:
        reason = f"a forward on the meta device failed with {type(error).__name__}: {error}"
        if _MaskCall.__name__ in reason:
            reason = "it applies the attention mask itself"
        raise _refused(architecture, reason) from error
    return model, tracing.calls


def _check_trace(architecture: str, model: Any, calls: Sequence[_AttentionCall], num_layers: int) -> None:
    if getattr(model, "_is_stateful", False):
        raise _refused(architecture, "it keeps a recurrent state")
    if [call.layer for call in calls] != list(range(num_layers)):
        attended = [call.layer for call in calls]
        reason = (
            f"its {num_layers} layers should attend once each, in order, but the layers of its calls are {attended}"
        )
        raise _refused(architecture, reason)
    for call in calls:
        if not call.is_plain:
            raise _refused(architecture, f"in layer {call.layer}, {call.why}")
        if call.mask is not None and not (isinstance(call.mask, _MaskCall) and _mask_is(call.mask)):
            raise _refused(architecture, f"the mask of layer {call.layer} is neither causal nor a sliding window")


def _max_position(architecture: str, config: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        raise _refused(architecture, "its configuration does not say how many positions it handles")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond it the library changes every frequency at once, which cached keys can't follow.
        return min(positions, int(rope["original_max_position_embeddings"]))
    return positions


# --- the module ----------------------------------------------------------------------------------------------------


class _BodyOutput:
    """What a body returns, as far as a head looks at it: the hidden states, and None for everything else."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class _GivenHidden(nn.Module):
    """Takes the place of the body inside the library's head, and hands it the hidden states it was called with."""

    def forward(self, *ids: None, inputs_embeds: torch.Tensor, **rest: Any) -> _BodyOutput:
        return _BodyOutput(inputs_embeds)


class TransformersForCausalLM(nn.Module):
    """A model of the transformers library behind the contract of this project."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.current = _Current()
        _attach(model, self.current)
        self.body: nn.Module = model.base_model
        # The library's own head applies whatever scale or cap the architecture has; its body is no longer in it.
        setattr(model, model.base_model_prefix, _GivenHidden())
        self.head: nn.Module = model

    def forward(self, ids_T: torch.Tensor, positions_T: torch.Tensor, step: AttentionStep) -> torch.Tensor:
        """Final hidden states after the last norm, [T, E]. ids and positions are int64 [T]; ``step`` attends."""
        self.current.step = step
        output = self.body(input_ids=ids_T[None], position_ids=positions_T[None], use_cache=False)
        hidden_TE: torch.Tensor = output.last_hidden_state[0]
        return hidden_TE

    def logits(self, hidden_NE: torch.Tensor) -> torch.Tensor:
        """Scores over the vocabulary, [N, V], as the library's head computes them."""
        scores_NV: torch.Tensor = self.head(inputs_embeds=hidden_NE[None], use_cache=False).logits[0]
        return scores_NV


class _PlainStep:
    """Attention of a few tokens without a cache, written out: for the check in build.

    The step's rows are the sequences' rows in the order ``order_T``.
    """

    def __init__(self, spec: AttentionSpec, lengths: Sequence[int], order_T: torch.Tensor) -> None:
        self._layers = spec.layers
        self._lengths = list(lengths)
        self._order_T = order_T
        self._sorted_T = order_T.argsort()

    def attend(self, layer: int, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor) -> torch.Tensor:
        attention = self._layers[layer]
        split = ((x[self._sorted_T]).split(self._lengths) for x in (q_THD, k_TGD, v_TGD))
        parts = [_plain_attention(attention, q, k, v) for q, k, v in zip(*split, strict=True)]
        return torch.cat(parts)[self._order_T]


def _plain_attention(
    attention: LayerAttention, q_THD: torch.Tensor, k_TGD: torch.Tensor, v_TGD: torch.Tensor
) -> torch.Tensor:
    repeats = attention.num_heads // attention.num_kv_heads
    k_THD, v_THD = (x.repeat_interleave(repeats, dim=1) for x in (k_TGD, v_TGD))
    scores_Htk = torch.einsum("thd,khd->htk", q_THD, k_THD).float() * attention.scale
    if attention.soft_cap is not None:
        scores_Htk = torch.tanh(scores_Htk / attention.soft_cap) * attention.soft_cap
    place = torch.arange(q_THD.shape[0], device=q_THD.device)
    hidden = place[None, :] > place[:, None]
    if attention.window is not None:
        hidden |= place[None, :] <= place[:, None] - attention.window
    weights_Htk = scores_Htk.masked_fill(hidden, float("-inf")).softmax(dim=-1).to(v_THD.dtype)
    return torch.einsum("htk,khd->thd", weights_Htk, v_THD)


def _probe_ids(vocab_size: int, device: torch.device) -> torch.Tensor:
    # Steps of a prime, so that neighbours differ and no id repeats in a vocabulary of any useful size.
    return (torch.arange(max(_PROBE_LENGTHS), device=device) * 7919 + 11) % vocab_size


@torch.inference_mode()
def _library_logits(model: Any, vocab_size: int) -> torch.Tensor:
    """The library's own scores for the probe tokens as one sequence, [T, V], by its eager attention."""
    model.set_attn_implementation("eager")
    logits: torch.Tensor = model(input_ids=_probe_ids(vocab_size, model.device)[None], use_cache=False).logits[0]
    model.set_attn_implementation(_IMPLEMENTATION)
    return logits


@torch.inference_mode()
def _check_against(module: TransformersForCausalLM, expected_TV: torch.Tensor) -> None:
    """Compare a packed forward with the library's own. Raises UnknownArchitectureError when they differ."""
    ids, total = _probe_ids(module.spec.vocab_size, expected_TV.device), sum(_PROBE_LENGTHS)
    # Shuffled, because neighbouring rows hide a model that counts rows instead of looking at the positions it is given.
    order_T = torch.arange(total, device=ids.device) * 5 % total
    packed = torch.cat([ids[:length] for length in _PROBE_LENGTHS])
    positions = torch.cat([torch.arange(length, device=ids.device) for length in _PROBE_LENGTHS])
    step = _PlainStep(module.spec.attention, _PROBE_LENGTHS, order_T)
    found = module.logits(module(packed[order_T], positions[order_T], step)).float()
    expected = torch.cat([expected_TV[:length] for length in _PROBE_LENGTHS])[order_T].float()
    error = float((found - expected).norm() / expected.norm())
    bound = 1e-3 if expected_TV.dtype == torch.float32 else 0.1
    if not error <= bound:  # a NaN fails too
        raise _refused(
            module.spec.architecture,
            f"packed tokens differ from the library's own result by {error:.2g} of its norm (bound {bound})",
        )


# --- loading -------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """The library draws bars of its own while it loads; progress is reported through the context instead."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _load(checkpoint: Checkpoint, config: Any, context: BuildContext) -> Any:
    """The library's model with its weights, on the device. Raises MissingTensorError and LoaderError."""
    where = str(checkpoint.path)
    if not checkpoint.path.is_dir():
        raise LoaderError("transformers reads folders with safetensors only", where=where)
    try:
        with _quiet():
            model, report = _library().AutoModelForCausalLM.from_pretrained(
                checkpoint.path,
                config=config,
                dtype=context.dtype,
                attn_implementation=_IMPLEMENTATION,
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
                # Or the library only says that something differs, and not what.
                ignore_mismatched_sizes=True,
            )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise LoaderError(f"transformers could not load the weights: {error}", where=where) from error
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"]))
        raise MissingTensorError(f"the files lack tensors that {checkpoint.architecture} needs: {names}", where=where)
    if report["mismatched_keys"]:
        raise LoaderError(f"tensors have another shape than the model: {report['mismatched_keys']}", where=where)
    if report["unexpected_keys"]:
        names = ", ".join(sorted(report["unexpected_keys"]))
        raise LoaderError(
            f"the files hold tensors that {checkpoint.architecture} has no place for: {names}",
            where=where,
            hint="The configuration describes another model than the weights.",
        )
    return model.to(context.device).eval()


def _without_values(keys: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The library's model on the meta device, tied as it would be after loading."""
    _register()
    with torch.device("meta"):
        model = _library().AutoModelForCausalLM.from_config(
            _library_config(keys), attn_implementation=_IMPLEMENTATION, dtype=dtype
        )
    model.tie_weights()
    return model


def _load_stored(checkpoint: Checkpoint, context: BuildContext) -> Any:
    """The library's model with the weights of a checkpoint whose layers are packed, which the library would unpack.

    The checkpoint itself is asked for each tensor by the name that the library's module has for it. Layers that the
    quantizer takes as they are stored are never there in full.
    """
    model = _without_values(checkpoint.config, context.dtype)
    held, used = set(checkpoint.names()), set()
    loaded: dict[int, nn.Parameter] = {}
    for name, part in list(model.named_modules()):
        stored = _stored(checkpoint, name, part, context)
        for own_name, placeholder in list(part.named_parameters(recurse=False)):
            full_name = f"{name}.{own_name}"
            used.add(full_name)
            if stored is not None and own_name == "weight":
                continue
            if id(placeholder) not in loaded:
                loaded[id(placeholder)] = nn.Parameter(_read(checkpoint, full_name, placeholder, context))
            setattr(part, own_name, loaded[id(placeholder)])
        if stored is not None:
            quantizer = cast(TakesStored, context.quantizer)
            bias = None if part.bias is None else part.bias.detach()
            model.set_submodule(name, quantizer.convert_stored(name, stored, bias))
    unused = sorted(held - used - {f"{name}.{own}" for name, own in _make_buffers(model, checkpoint, context)})
    if unused:
        raise LoaderError(
            f"the files hold tensors that {checkpoint.architecture} has no place for: {', '.join(unused[:8])}",
            where=str(checkpoint.path),
            hint="The configuration describes another model than the weights.",
        )
    return model.eval()


def _stored(checkpoint: Checkpoint, name: str, part: nn.Module, context: BuildContext) -> PackedWeight | None:
    quantizer = context.quantizer
    weight = f"{name}.weight"
    if type(part) is not nn.Linear or not isinstance(quantizer, TakesStored) or weight not in checkpoint:
        return None
    stored = checkpoint.packed(weight)
    return stored.to(context.device) if stored is not None and quantizer.takes(name, stored) else None


def _read(checkpoint: Checkpoint, name: str, placeholder: torch.Tensor, context: BuildContext) -> torch.Tensor:
    if name not in checkpoint or tuple(checkpoint.shape(name)) != tuple(placeholder.shape):
        found = tuple(checkpoint.shape(name)) if name in checkpoint else None
        raise MissingTensorError(
            f"the files hold no tensor {name} of shape {tuple(placeholder.shape)} for {checkpoint.architecture}",
            where=str(checkpoint.path),
            found=found,
            hint="The library may store this architecture in another form than it runs it; use the full weights.",
        )
    own = torch.empty(placeholder.shape, dtype=context.dtype, device=context.device)
    return own.copy_(checkpoint.tensor(name, context.dtype))


def _make_buffers(model: Any, checkpoint: Checkpoint, context: BuildContext) -> list[tuple[str, str]]:
    """Give every buffer its values: of the files, or as the library makes them of the configuration. Returns those of
    the files."""
    read = []
    for name, part in model.named_modules():
        empty = [own_name for own_name, buffer in part.named_buffers(recurse=False) if buffer.is_meta]
        made = []
        for own_name in empty:
            buffer = part.get_buffer(own_name)
            if f"{name}.{own_name}" in checkpoint:
                setattr(part, own_name, _read(checkpoint, f"{name}.{own_name}", buffer, context).to(buffer.dtype))
                read.append((name, own_name))
            elif context.device.type != "meta":
                # NaN, so that a buffer which the library does not fill is seen.
                value = float("nan") if buffer.is_floating_point() else 0
                setattr(part, own_name, torch.full_like(buffer, value, device=context.device))
                made.append(own_name)
        if made:
            model._init_weights(part)
        for own_name in made:
            buffer = part.get_buffer(own_name)
            if not buffer.is_floating_point() or bool(buffer.isnan().any()):
                reason = f"its {name}.{own_name} is not in the files, and the library does not say how it is made"
                raise _refused(checkpoint.architecture, f"{reason}, as packed layers need")
    return read


def _quantize(module: TransformersForCausalLM, context: BuildContext) -> None:
    quantizer = context.quantizer
    if quantizer is None:
        return
    tables = [(name, part) for name, part in module.named_modules() if type(part) is nn.Embedding]
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Linear):
            converted = quantizer.convert(_known(module, name), part)
            module.set_submodule(name, converted)
            for table_name, table in tables:
                if isinstance(converted, PackedLinear) and table.weight is part.weight:
                    _share_table(module, table_name, converted, context)


def _known(module: TransformersForCausalLM, name: str) -> str:
    """What the checkpoint calls a layer: a quantizer does not know our two halves of the model."""
    half, _, rest = name.partition(".")
    return f"{module.head.base_model_prefix}.{rest}" if half == "body" else rest


def _share_table(module: TransformersForCausalLM, name: str, head: PackedLinear, context: BuildContext) -> None:
    """Have a tied table looked up in the packed output layer. Only torch's plain embedding is replaced: a class of the
    architecture's own may do more than look up, and keeps its full table."""
    if not isinstance(context.quantizer, DecidesTables) or context.quantizer.packs_table(_known(module, name)):
        module.set_submodule(name, PackedEmbedding(head.packed, context.dtype))


class TransformersModel(Model):
    """Every other causal architecture of the transformers library, through its attention interface."""

    tier = Tier.REFERENCE

    @classmethod
    def probe(cls, context: ProbeContext) -> Probe:
        if importlib.util.find_spec("transformers") is None:
            return Probe.no(
                "missing_dependency",
                'the package transformers is not installed; run: pip install "drivetrain[transformers]"',
                wanted="transformers",
                offered="not installed",
            )
        path = context.path if context.path is not None else getattr(context.checkpoint, "path", None)
        if path is not None and Path(path).is_file():
            return Probe.no(
                "other_format", f"{path} is one file", wanted="a folder with safetensors", offered=str(path)
            )
        if context.checkpoint is None:
            return Probe.yes("no weights opened yet")
        architecture = context.checkpoint.architecture
        if architecture.endswith(_SUFFIXES):
            return Probe.yes(f"{architecture} is a causal language model")
        return Probe.no(
            "unsupported_architecture",
            f"{architecture} is no causal language model by its name",
            wanted=architecture,
            offered=" or ".join(f"*{suffix}" for suffix in _SUFFIXES),
        )

    def describe(self, config: Mapping[str, Any], dtype: str) -> ModelSpec:
        library_config = _library_config(config)
        architecture = str(config["architectures"][0])
        num_layers = getattr(library_config, "num_hidden_layers", None)
        if not isinstance(num_layers, int):
            raise _refused(architecture, "its configuration does not say how many layers it has")
        model, calls = _trace(architecture, library_config)
        _check_trace(architecture, model, calls, num_layers)
        return ModelSpec(
            architecture=architecture,
            vocab_size=int(library_config.vocab_size),
            hidden_size=int(library_config.hidden_size),
            num_layers=num_layers,
            max_position=_max_position(architecture, library_config),
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            attention=AttentionSpec(tuple(call.layer_attention for call in calls), dtype),
        )

    @classmethod
    def abilities(cls) -> frozenset[str]:
        return frozenset({"meta"})

    def build(self, checkpoint: Checkpoint, context: BuildContext) -> CausalLM:
        spec = self.describe(checkpoint.config, str(context.dtype).removeprefix("torch."))
        is_stored = checkpoint.packed_by is not None
        if context.device.type == "meta":
            model = (
                _load_stored(checkpoint, context) if is_stored else _without_values(checkpoint.config, context.dtype)
            )
            module = TransformersForCausalLM(model, spec)
            _quantize(module, context)
            return module.eval()
        what = f"loading {spec.architecture}"
        context.progress(what, 0, 1, "models")
        if is_stored:
            model = _load_stored(checkpoint, context)
        else:
            model = _load(checkpoint, _library_config(checkpoint.config), context)
        expected = _library_logits(model, spec.vocab_size)
        module = TransformersForCausalLM(model, spec)
        _check_against(module, expected)
        _quantize(module, context)
        context.progress(what, 1, 1, "models")
        return module.eval()
