"""Tokenizers from GGUF metadata.

GGUF keeps a vocabulary, its merges or scores, and a name for the rule that cuts text into pieces. The rest of what
tokenizer.json says (normalizer, decoder, post-processor) follows from that name, and is put together here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.contracts.loader import TokenizerData
from drivetrain.errors import LoaderError, nearest

if TYPE_CHECKING:
    import tokenizers

_SPACE = "\u2581"
_MODELS = ("gpt2", "llama")


class TokenType(IntEnum):
    """Values of ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut into pieces before merges apply.

    pattern:       regular expression of the pieces; None is GPT-2's own.
    single_digits: each digit is a piece of its own, cut before the pattern applies.
    ignore_merges: a piece that is a token is taken whole, whatever the merges say.
    nfc:           text is brought to Unicode normal form C first.
    adds_bos:      whether a start token is added when the file does not say.
    """

    pattern: str | None = None
    single_digits: bool = False
    ignore_merges: bool = False
    nfc: bool = False
    adds_bos: bool = False


# The patterns are those of the models' published tokenizer.json files.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_HEAD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+"
_CASED_TAIL = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"

_LLAMA3 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
_TEKKEN = rf"{_CASED_HEAD}|{_CASED_TAIL}|\p{{N}}|{_REST_WITH_SLASH}"
_GPT4O = rf"{_CASED_HEAD}{_CONTRACTIONS}?|{_CASED_TAIL}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_REST_WITH_SLASH}"

_GPT2_RULE = PreTokenizer()
_DIGITS_RULE = PreTokenizer(single_digits=True)
_LLAMA3_RULE = PreTokenizer(_LLAMA3, ignore_merges=True, adds_bos=True)
_CL100K_RULE = PreTokenizer(_LLAMA3)
_QWEN2_RULE = PreTokenizer(_QWEN2, nfc=True)
_TEKKEN_RULE = PreTokenizer(_TEKKEN, ignore_merges=True, adds_bos=True)
_GPT4O_RULE = PreTokenizer(_GPT4O)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": _GPT2_RULE,
    "gpt-2": _GPT2_RULE,
    "olmo": _GPT2_RULE,
    "smollm": _DIGITS_RULE,
    "refact": _DIGITS_RULE,
    "starcoder": _DIGITS_RULE,
    "codeshell": _DIGITS_RULE,
    "command-r": _DIGITS_RULE,
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "smaug-bpe": _CL100K_RULE,
    "dbrx": _CL100K_RULE,
    "qwen2": _QWEN2_RULE,
    "deepseek-r1-qwen": _QWEN2_RULE,
    "tekken": _TEKKEN_RULE,
    "gpt-4o": _GPT4O_RULE,
}
"""Values of ``tokenizer.ggml.pre`` that are known, with what they mean."""


class GgufVocabulary:
    """The ``tokenizer.*`` part of a GGUF file's metadata. Raises LoaderError for what it lacks."""

    def __init__(self, metadata: Mapping[str, Any], path: Path) -> None:
        self.metadata = metadata
        self.path = path
        self.model = metadata.get("tokenizer.ggml.model")
        if self.model not in _MODELS:
            raise LoaderError(
                "this kind of tokenizer is not known" if self.model else "the file carries no tokenizer",
                where=str(path),
                found=self.model,
                allowed=_MODELS,
            )
        self.tokens: list[str] = self._need("tokens")
        self.types = [TokenType.NORMAL] * len(self.tokens)
        if "tokenizer.ggml.token_type" in metadata:
            self.types = self._need("token_type")
        if len(self.types) != len(self.tokens):
            raise LoaderError(
                f"the vocabulary has {len(self.tokens)} tokens but {len(self.types)} token types", where=str(path)
            )

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def _need(self, key: str) -> Any:
        value = self.get(key)
        if not value:
            raise LoaderError(f"the metadata lacks tokenizer.ggml.{key}", where=str(self.path))
        return value

    @property
    def pre_tokenizer(self) -> PreTokenizer:
        name = self.get("pre", "default")
        rule = PRE_TOKENIZERS.get(name)
        if rule is None:
            close = nearest(str(name), PRE_TOKENIZERS)
            raise LoaderError(
                "the rule that cuts text into pieces (tokenizer.ggml.pre) is not known",
                where=str(self.path),
                found=name,
                allowed=PRE_TOKENIZERS,
                hint=f"The nearest known one is {close!r}" if close else "Use the model's safetensors version",
            )
        return rule

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The merges as the file lists them: two tokens with one space between."""
        pairs = []
        for merge in self._need("merges"):
            left, space, right = merge.partition(" ")
            if not space or not left or not right:
                raise LoaderError(
                    "tokenizer.ggml.merges holds an entry that is no pair", where=str(self.path), found=merge
                )
            pairs.append((left, right))
        return pairs

    @property
    def scores(self) -> list[float]:
        scores: list[float] = self._need("scores")
        if len(scores) != len(self.tokens):
            raise LoaderError(
                f"the vocabulary has {len(self.tokens)} tokens but {len(scores)} scores", where=str(self.path)
            )
        return scores

    def role(self, name: str) -> str | None:
        """Text of the token that plays a role: bos, eos, unknown, padding."""
        index = self.get(f"{name}_token_id")
        if index is None:
            return None
        if not 0 <= index < len(self.tokens):
            raise LoaderError(
                f"tokenizer.ggml.{name}_token_id is outside of the vocabulary of {len(self.tokens)}",
                where=str(self.path),
                found=index,
            )
        return self.tokens[index]


def read_tokenizer(metadata: Mapping[str, Any], path: Path) -> TokenizerData:
    """The tokenizer and chat template of a GGUF file. Raises LoaderError that names what is missing or unknown."""
    vocabulary = GgufVocabulary(metadata, path)
    architecture = str(metadata.get("general.architecture", ""))
    try:
        backend = _byte_level(vocabulary) if vocabulary.model == "gpt2" else _sentencepiece(vocabulary, architecture)
        _add_special_tokens(backend, vocabulary, strip_after=architecture == "phi3")
        _add_post_processor(backend, vocabulary)
    except LoaderError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception for every fault in its parts
        raise LoaderError(f"the tokenizer in the metadata can't be built: {error}", where=str(path)) from error
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {role: text for role, name in roles.items() if (text := vocabulary.role(name)) is not None}
    template = metadata.get("tokenizer.chat_template")
    return TokenizerData(backend, template if isinstance(template, str) else None, special)


def _byte_level(vocabulary: GgufVocabulary) -> tokenizers.Tokenizer:
    """Byte-level BPE: tokens are written in GPT-2's alphabet of 256 printable characters, one for each byte."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    rule = vocabulary.pre_tokenizer
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=vocabulary.merges, ignore_merges=rule.ignore_merges))
    cuts: list[Any] = []
    if rule.single_digits:
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    if rule.pattern is not None:
        cuts.append(pre_tokenizers.Split(Regex(rule.pattern), behavior="isolated"))
    prefix = bool(vocabulary.get("add_space_prefix", False))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=rule.pattern is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    backend.decoder = decoders.ByteLevel()
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(vocabulary: GgufVocabulary, architecture: str) -> tokenizers.Tokenizer:
    """SentencePiece BPE: spaces become U+2581, and what no token covers is spelled in byte tokens ``<0xNN>``."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    is_gemma = architecture.startswith("gemma")
    tokens = [_respelled(token, kind) for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)]
    ids = {token: index for index, token in enumerate(tokens)}
    # Gemma's scores do not follow the order of its merges; the order of its tokens does.
    scores = [-float(index) for index in range(len(tokens))] if is_gemma else vocabulary.scores
    merges = (
        vocabulary.merges if vocabulary.get("merges") else _merges_from_scores(ids, tokens, scores, vocabulary.types)
    )
    unknown = vocabulary.role("unknown")
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(vocabulary.get("add_space_prefix", not is_gemma))
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _respelled(token: str, kind: int) -> str:
    """User-defined runs of spaces are stored with real spaces, but the text they must match has U+2581 by then."""
    if kind == TokenType.USER_DEFINED and token and not token.strip(" "):
        return _SPACE * len(token)
    return token


def _merges_from_scores(
    ids: Mapping[str, int], tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """The merges that SentencePiece's scores stand for: a token is made from any two others, the best score first."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind not in (TokenType.NORMAL, TokenType.USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _add_special_tokens(backend: tokenizers.Tokenizer, vocabulary: GgufVocabulary, *, strip_after: bool) -> None:
    """Tokens that are found in text as a whole: control tokens (hidden in output) and user-defined ones (shown).

    strip_after: Phi-3's markers swallow the white space behind them, all but its three general ones.
    """
    from tokenizers import AddedToken

    kept_apart = ("<unk>", "<s>", "<|endoftext|>")
    special, plain = [], []
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if not token:
            continue
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            strips = strip_after and vocabulary.model == "llama" and token not in kept_apart
            special.append(AddedToken(token, special=True, normalized=False, rstrip=strips))
        elif kind == TokenType.USER_DEFINED and token.strip(" "):
            plain.append(AddedToken(token, special=False, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _add_post_processor(backend: tokenizers.Tokenizer, vocabulary: GgufVocabulary) -> None:
    """Start and end tokens around a text, where the file asks for them."""
    from tokenizers import processors

    by_default = vocabulary.model == "llama" or vocabulary.pre_tokenizer.adds_bos
    bos = vocabulary.role("bos") if vocabulary.get("add_bos_token", by_default) else None
    eos = vocabulary.role("eos") if vocabulary.get("add_eos_token", False) else None
    if bos is None and eos is None:
        return
    around = [(text, vocabulary.tokens.index(text)) for text in (bos, eos) if text is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
        pair=[*([bos] if bos else []), "$A", "$B:1", *([eos] if eos else [])],
        special_tokens=list(dict(around).items()),
    )
