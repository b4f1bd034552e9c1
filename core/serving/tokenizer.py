"""Text to token ids and back: encoding, chat templates, and detokenizing while tokens still arrive.

The text of a sequence of tokens is the UTF-8 reading of their bytes laid end to end. That makes streaming exact: a
token's bytes never change with what follows, and half a character is held back until its other half comes.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from drivetrain.errors import DrivetrainError, InvalidRequestError

if TYPE_CHECKING:
    import jinja2

    from drivetrain.contracts.loader import TokenizerData

LONG_TEXT = 16_384
"""Characters, or tokens, above which reading a text takes so long (some ms) that nobody else should wait for it."""

_REPLACEMENT = "\ufffd"
_MAX_TEMPLATE_STEPS = 300_000
_MAX_REPEATED_LENGTH = 10_000_000
_MAX_POWER_BITS = 4096
_BUDGET = "step budget"  # no identifier, so that no template can name it
# What a template's own arithmetic and look-ups may raise beside jinja2's errors.
_TEMPLATE_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
# Marks where the last message ends. A noncharacter: it can't occur in valid interchanged text (Unicode, section 23.7).
_END_OF_CONTENT = "\ufdd0end\ufdd1"


class _Spelling(Enum):
    """How the vocabulary writes the bytes of a token."""

    BYTE_LEVEL = "each byte as one printable character (GPT-2)"
    BYTE_FALLBACK = "characters with U+2581 for a space, or one byte as <0xNN> (SentencePiece)"
    OTHER = "known only to the library's decoder"


class Tokenizer:
    """Encodes, decodes and renders chats with the tokenizer that came with the weights. Safe to share over threads."""

    def __init__(self, data: TokenizerData) -> None:
        self._backend = data.backend
        self._template_source = data.chat_template
        self._special = dict(data.special)
        decoder = _decoder_parts(self._backend.decoder)
        self._spelling = _spelling(decoder)
        self._strips_first_space = {"type": "Strip", "content": " ", "start": 1, "stop": 0} in decoder
        self._bytes: dict[int, bytes] = {}
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(index for index, token in added.items() if token.special)

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer, added ones included; the model's table of embeddings may be larger."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def has_chat_template(self) -> bool:
        return self._template_source is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Special tokens written out in the text are found as such.

        A long text is read without holding the interpreter: other threads go on meanwhile.

        add_special_tokens: add what the tokenizer puts around a text, usually a start token.
        Raises InvalidRequestError for text that is no valid Unicode (half of a surrogate pair).
        """
        try:
            if len(text) > LONG_TEXT:  # of the library's calls, those for batches let go of the interpreter
                (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            else:
                encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequestError("the text is not valid Unicode", param="prompt") from error
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``ids``, with no clean-up of spaces; bytes that are no UTF-8 come out as U+FFFD."""
        if len(ids) > LONG_TEXT:  # as in encode
            return str(self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0])
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """Text of one token as it stands inside a sequence, its leading space included; special tokens are written
        out, and a part of a character is U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token adds to the text; empty for an id that no token has.

        Exact for byte-level and byte-fallback vocabularies; for others the UTF-8 of the token decoded by itself.
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spelled_bytes(token_id)
        return known

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of text under ``skip_special_tokens``."""
        return token_id in self._special_ids

    def has_special(self, ids: Sequence[int]) -> bool:
        """Whether any of these tokens is."""
        return not self._special_ids.isdisjoint(ids)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation, by the model's chat template.

        messages:              each with a ``role`` and a ``content``: text, or a list of ``{"type": "text"}`` parts.
        add_generation_prompt: end with the words that make the model answer.
        continue_final:        leave the last message open, for the model to go on with.
        variables:             further names the template may use, for example ``tools`` or ``enable_thinking``.

        The result carries its own special tokens: encode it with ``add_special_tokens=False``. Raises
        InvalidRequestError (param ``messages``) when there is no template, a message is malformed, or the template
        refuses.
        """
        if continue_final and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final leaves the last message open, so there can be no generation prompt",
                param="continue_final",
                hint="Set add_generation_prompt to false",
            )
        if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
            raise InvalidRequestError(
                "messages must be a list of messages", param="messages", found=type(messages).__name__
            )
        template = self._template
        prepared = [_prepared(message, index, template.wants_parts) for index, message in enumerate(messages)]
        if not prepared:
            raise InvalidRequestError("there must be at least one message", param="messages")
        if "messages" in (variables or {}):
            raise InvalidRequestError("the messages are no variable of a chat template", param="messages")
        if continue_final:
            prepared[-1] = _marked(prepared[-1])
        names = {**self._special, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        text = template.render({**names, **(variables or {}), "messages": prepared})
        if not continue_final:
            return text
        if _END_OF_CONTENT not in text:
            raise InvalidRequestError(
                "the chat template drops the last message, so it can't be continued", param="messages"
            )
        return text[: text.rindex(_END_OF_CONTENT)].replace(_END_OF_CONTENT, "")

    @cached_property
    def _template(self) -> _ChatTemplate:
        if self._template_source is None:
            raise InvalidRequestError(
                "this model has no chat template",
                param="messages",
                hint="Use plain completions, or an instruction-tuned version of the model",
            )
        return _ChatTemplate(self._template_source)

    def _spelled_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        if self._spelling is _Spelling.BYTE_LEVEL:
            # As the library's decoder has it: one character outside of the alphabet, and the token means itself.
            spelled = [_BYTE_OF.get(character) for character in token]
            return token.encode() if None in spelled else bytes(byte for byte in spelled if byte is not None)
        if self._spelling is _Spelling.BYTE_FALLBACK:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                try:
                    return bytes([int(token[3:5], 16)])
                except ValueError:
                    return token.encode()
            return token.replace("\u2581", " ").encode()
        return str(self._backend.decode([token_id], skip_special_tokens=False)).encode()

    def _starts_text(self, prompt_ids: Iterable[int], skip_special_tokens: bool) -> bool:
        """Whether text that follows ``prompt_ids`` is the first there is."""
        return not any(
            self.token_bytes(index) for index in prompt_ids if not (skip_special_tokens and self.is_special(index))
        )


class Detokenizer:
    """Text of one sequence while its tokens arrive; each token costs the same however long the sequence is.

    All that ``push`` and ``flush`` return, joined, equals what ``tokenizer.decode(prompt + output)`` has behind
    ``tokenizer.decode(prompt)``; an incomplete last character is left out. Bytes that are no UTF-8 become one U+FFFD
    for each maximal part of a character (Unicode, section 3.9). Byte-level tokenizers decode them in the same way. The
    ``decode`` of byte-fallback ones differs there: one bad byte turns its whole run of byte tokens into U+FFFD, one
    for each, which can't be known while part of the run is still to come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream: _TextStream
        if tokenizer._spelling is _Spelling.OTHER:
            self._stream = _WindowStream(tokenizer, prompt_ids, skip_special_tokens)
        else:
            # SentencePiece puts a space before the first word of a text, which is not part of it.
            strips = tokenizer._strips_first_space and tokenizer._starts_text(prompt_ids, skip_special_tokens)
            self._stream = _ByteStream(tokenizer, strips)

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; may be empty."""
        if self._skip_special_tokens and self._tokenizer.has_special(ids):
            ids = [index for index in ids if not self._tokenizer.is_special(index)]
        return self._stream.push(ids)

    def flush(self) -> str:
        """Whatever complete text was still held back. Call it once, after the last token."""
        return self._stream.flush()


class _TextStream(Protocol):
    def push(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class _ByteStream:
    """Joins the tokens' bytes and reads them as UTF-8, piece by piece."""

    def __init__(self, tokenizer: Tokenizer, strips_first_space: bool) -> None:
        self._tokenizer = tokenizer
        self._strips_first_space = strips_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_inside_character = False

    def push(self, ids: Sequence[int]) -> str:
        joined = b"".join(map(self._tokenizer.token_bytes, ids))
        if self._strips_first_space and joined:
            joined = joined.removeprefix(b" ")
            self._strips_first_space = False
        if not self._is_inside_character and joined.isascii():
            return joined.decode("ascii")  # most tokens; the decoder is code of Python, and takes twice as long
        text = self._decoder.decode(joined)
        self._is_inside_character = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        # Complete text has gone out already. What is held back is the beginning of one character, which is left out, or
        # bytes such as ED A0 that Python's decoder waits on although no character begins so.
        text = self._decoder.getstate()[0].decode("utf-8", "replace")
        return text if len(text) > 1 else ""


class _WindowStream:
    """For decoders that only the library knows: decode a short window of tokens with and without the new ones."""

    _CONTEXT_TOKENS = 6
    _LONGEST_CHARACTER_TOKENS = 4

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._shown = list(prompt_ids[-self._CONTEXT_TOKENS :])
        self._new: list[int] = []

    def push(self, ids: Sequence[int]) -> str:
        return "".join(self._push_one(index) for index in ids)

    def _push_one(self, index: int) -> str:
        self._new.append(index)
        text = self._new_text()
        if text.endswith(_REPLACEMENT) and len(self._new) < self._LONGEST_CHARACTER_TOKENS:
            return ""
        self._shown = [*self._shown, *self._new][-self._CONTEXT_TOKENS :]
        self._new = []
        return text

    def flush(self) -> str:
        return self._new_text().rstrip(_REPLACEMENT)

    def _new_text(self) -> str:
        skip = self._skip_special_tokens
        before = self._tokenizer.decode(self._shown, skip_special_tokens=skip)
        both = self._tokenizer.decode([*self._shown, *self._new], skip_special_tokens=skip)
        return both[len(before) :]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: a printable Latin-1 byte is its own character, and the others follow from U+0100
    on, in order (Radford et al. 2019, section 2.2; the table is part of every byte-level tokenizer.json)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _decoder_parts(decoder: Any) -> list[dict[str, Any]]:
    """The decoder's steps in the words of tokenizer.json; empty without one."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _spelling(parts: Sequence[Mapping[str, Any]]) -> _Spelling:
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return _Spelling.BYTE_LEVEL
    spaces = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    if parts and parts[0] == spaces and kinds[1:] in (["ByteFallback", "Fuse"], ["ByteFallback", "Fuse", "Strip"]):
        return _Spelling.BYTE_FALLBACK
    return _Spelling.OTHER


# --- chat templates --------------------------------------------------------------------------------------------------


class _ChatTemplate:
    """A compiled chat template.

    It came with files from the network, so it runs in jinja2's sandbox: no attribute that leads to the interpreter, no
    change of its arguments, and a bound on the steps it may take.

    wants_parts: it reads ``content`` as a list of parts only, never as text.
    """

    def __init__(self, source: str) -> None:
        import jinja2
        from jinja2 import nodes

        self._environment = _sandbox()
        try:
            tree = self._environment.parse(source)
            loops = list(tree.find_all(nodes.For))
            self.wants_parts = " is string" not in source and any(_reads_content(loop.iter) for loop in loops)
            for loop in loops:
                loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
            code = self._environment.compile(tree)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InvalidRequestError(
                f"the model's chat template does not compile: {error}",
                param="messages",
                hint="Use plain completions, or another version of the model's files",
            ) from error
        globals_ = self._environment.make_globals(None)
        self._template = self._environment.template_class.from_code(self._environment, code, globals_)

    def render(self, names: Mapping[str, Any]) -> str:
        import jinja2

        try:
            return self._template.render({**names, _BUDGET: _StepBudget()})
        except DrivetrainError:
            raise
        except jinja2.TemplateError as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}", param="messages") from error
        except _TEMPLATE_FAULTS as error:
            raise InvalidRequestError(
                f"the chat template fails on these messages: {type(error).__name__}: {error}", param="messages"
            ) from error


class _StepBudget:
    """Steps (rounds of loops, and calls) that one rendering may still take."""

    def __init__(self) -> None:
        self.left = _MAX_TEMPLATE_STEPS

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise InvalidRequestError(
                f"the chat template takes more than {_MAX_TEMPLATE_STEPS} steps", param="messages"
            )


class _Counted:
    """An iterable that spends one step a round; keeps its length, which templates ask of loops."""

    def __init__(self, items: Any, budget: _StepBudget) -> None:
        self._items = items
        self._budget = budget

    def __iter__(self) -> Any:
        for item in self._items:
            self._budget.spend()
            yield item

    def __len__(self) -> int:
        return len(self._items)


def _sandbox() -> jinja2.Environment:
    """The environment that chat templates are written for: block tags leave no blank lines, loops can be left, and
    ``raise_exception``, ``strftime_now``, ``tojson`` and ``{% generation %}`` exist."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the model is trained on; when rendering, its body is all it means."""

        tags = {"generation"}

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    class Sandbox(ImmutableSandboxedEnvironment):
        # One expression of these can take for ever or fill the memory.
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            for items, count in ((left, right), (right, left)):
                if operator == "*" and isinstance(items, str | list | tuple) and isinstance(count, int):
                    _bound("a repetition", len(items) * count, _MAX_REPEATED_LENGTH)
            if operator == "**" and isinstance(left, int) and isinstance(right, int):
                _bound("a power", left.bit_length() * right, _MAX_POWER_BITS)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
            context[_BUDGET].spend()
            return super().call(context, callee, *args, **kwargs)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    @jinja2.pass_context
    def counted(context: Any, items: Any) -> _Counted:
        return _Counted(items, context[_BUDGET])

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.filters["counted"] = counted
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _bound(what: str, size: int, most: int) -> None:
    if size > most:
        raise InvalidRequestError(
            f"the chat template asks for {what} of size {size}, more than {most}", param="messages"
        )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models are trained on it: jinja2's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _reads_content(expression: Any) -> bool:
    """Whether a loop goes over ``message.content`` or ``message['content']``."""
    from jinja2 import nodes

    if isinstance(expression, nodes.Filter) and expression.node is not None:
        return _reads_content(expression.node)
    if isinstance(expression, nodes.Getattr):
        return expression.attr == "content"
    return isinstance(expression, nodes.Getitem) and (
        isinstance(expression.arg, nodes.Const) and expression.arg.value == "content"
    )


def _prepared(message: Mapping[str, Any], index: int, wants_parts: bool) -> dict[str, Any]:
    """One message, checked, its content in the form that the template reads."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequestError("a message needs a role and a content", param="messages", where=where, found=message)
    content = message.get("content")
    if content is not None and not isinstance(content, str | list | tuple):
        raise InvalidRequestError(
            "content must be text or a list of text parts", param="messages", where=where, found=type(content).__name__
        )
    if isinstance(content, list | tuple):
        content = "".join(_part_text(part, where) for part in content)
    if wants_parts and isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return {**message, "content": content}


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InvalidRequestError(
        "only parts of type text are supported", param="messages", where=where, found=kind, allowed='{"type": "text"}'
    )


def _marked(message: Mapping[str, Any]) -> dict[str, Any]:
    """The last message with a mark behind its content, so that its end can be found in the rendered text."""
    content = message["content"]
    if isinstance(content, list) and content:
        return {**message, "content": [{"type": "text", "text": content[0]["text"] + _END_OF_CONTENT}]}
    return {**message, "content": (content or "") + _END_OF_CONTENT}
