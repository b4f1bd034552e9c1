"""Text to ids and back, chat templates in their sandbox, and streams that never show half a character."""

from __future__ import annotations

import contextlib
import pydoc_data.topics
import re
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from drivetrain.contracts.loader import TokenizerData
from drivetrain.errors import InvalidRequestError
from drivetrain.serving.tokenizer import Detokenizer, Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["Hello, world!", " leading", "naïve café 你好 🎉👩‍👩‍👧 \n\n x", "", "مرحبا", "a  b\t c", "<0x41> x"]


def byte_level(template: str | None = None) -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
    )
    backend.train_from_iterator([*list(pydoc_data.topics.topics.values())[:10], "你好世界🎉🎊" * 30], trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("ä ö", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return Tokenizer(TokenizerData(backend, template, {"bos_token": "<s>", "eos_token": "</s>"}))


def byte_fallback(*, prefix: bool = True) -> Tokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz好é"]
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *("".join(merge) for merge in merges)])}
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(TokenizerData(backend, None, {"bos_token": "<s>"}))


def word_pieces() -> Tokenizer:
    pieces = ["[UNK]", "[SEP]", "un", "##believ", "##able", "story", ",", "told", "##é"]
    backend = Backend(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[SEP]"])
    return Tokenizer(TokenizerData(backend, None, {}))


BYTE_LEVEL, SENTENCEPIECE, NO_PREFIX, WORD_PIECES = (
    byte_level(),
    byte_fallback(),
    byte_fallback(prefix=False),
    word_pieces(),
)
EXACT = [BYTE_LEVEL, SENTENCEPIECE, NO_PREFIX]


def chat(template: str) -> Tokenizer:
    return Tokenizer(TokenizerData(BYTE_LEVEL._backend, template, {"bos_token": "<s>", "eos_token": "</s>"}))


def render(template: str, content: Any = "Hi", **options: Any) -> str:
    return chat(template).render_chat([{"role": "user", "content": content}], **options)


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int], *, skip: bool = True, step: int = 1) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip)
    parts = [detokenizer.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    return [*parts, detokenizer.flush()]


# --- encode and decode ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", EXACT)
@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_added_found_and_hidden() -> None:
    ids = BYTE_LEVEL.encode("a</s>b")
    assert [BYTE_LEVEL.token_text(index) for index in ids] == ["<s>", "a", "</s>", "b"]
    assert BYTE_LEVEL.encode("a", add_special_tokens=False) == ids[1:2]
    assert BYTE_LEVEL.decode(ids) == "ab"
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=False) == "<s>a</s>b"
    assert BYTE_LEVEL.is_special(ids[0])
    assert not BYTE_LEVEL.is_special(BYTE_LEVEL.encode("<think>")[1])


def test_half_a_surrogate_pair_is_a_bad_request() -> None:
    with pytest.raises(InvalidRequestError, match="Unicode"):
        BYTE_LEVEL.encode("a\ud83d")


@pytest.mark.parametrize("tokenizer", EXACT)
@pytest.mark.parametrize("text", TEXTS)
def test_token_bytes_laid_end_to_end_are_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(tokenizer.token_bytes(index) for index in ids).decode()
    assert joined == (f" {text}" if tokenizer is SENTENCEPIECE and text else text)


def test_token_text_keeps_spaces_specials_and_marks_parts_of_characters() -> None:
    the = SENTENCEPIECE.encode("the", add_special_tokens=False)
    assert [SENTENCEPIECE.token_text(index) for index in the] == [" the"]
    assert SENTENCEPIECE.token_text(1) == "<s>"
    assert SENTENCEPIECE.token_text(3 + 0xC3) == "\ufffd"
    assert SENTENCEPIECE.token_bytes(3 + 0xC3) == b"\xc3"
    assert BYTE_LEVEL.token_text(10**6) == ""
    assert BYTE_LEVEL.token_bytes(-1) == b""
    assert next(WORD_PIECES.token_text(index) for index in WORD_PIECES.encode("unbelievable")) == "un"


def test_vocab_size_counts_added_tokens() -> None:
    assert BYTE_LEVEL.vocab_size == 402


# --- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", EXACT)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_stream_shows_whole_characters_only(tokenizer: Tokenizer, step: int) -> None:
    text = "naïve 你好 🎉👩‍👩‍👧 done"
    parts = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False), [], step=step)
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)


@pytest.mark.parametrize("tokenizer", EXACT)
def test_an_unfinished_last_character_is_left_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x 🎉", add_special_tokens=False)
    cut = len(ids) - 1
    assert "".join(stream(tokenizer, ids[:cut], [])) == "x "


def test_the_first_space_belongs_to_the_text_only_behind_a_prompt() -> None:
    ids = SENTENCEPIECE.encode("the a", add_special_tokens=False)
    assert "".join(stream(SENTENCEPIECE, ids, [])) == "the a"
    assert "".join(stream(SENTENCEPIECE, ids, [1])) == "the a"
    assert "".join(stream(SENTENCEPIECE, ids, [1], skip=False)) == " the a"
    assert "".join(stream(SENTENCEPIECE, ids, SENTENCEPIECE.encode("x"))) == " the a"


def test_special_tokens_in_a_stream_follow_the_flag() -> None:
    ids = BYTE_LEVEL.encode("a</s>b", add_special_tokens=False)
    assert "".join(stream(BYTE_LEVEL, ids, [])) == "ab"
    assert "".join(stream(BYTE_LEVEL, ids, [], skip=False)) == "a</s>b"


def without_cut_tail(data: bytes) -> str:
    """``data`` as UTF-8 but for an incomplete last character; the definition of a stream's text, written anew."""
    for cut in range(min(3, len(data)) + 1):
        head, tail = data[: len(data) - cut], data[len(data) - cut :]
        is_prefix = re.fullmatch(
            rb"[\xc2-\xdf]|(\xe0[\xa0-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]|\xed[\x80-\x9f])|[\xe0-\xef]"
            rb"|[\xf0-\xf4]|(\xf0[\x90-\xbf]|[\xf1-\xf3][\x80-\xbf]|\xf4[\x80-\x8f])[\x80-\xbf]?",
            tail,
        )
        if cut and is_prefix:
            return head.decode("utf-8", "replace")
    return data.decode("utf-8", "replace")


def test_bytes_that_begin_no_character_are_shown_at_the_end() -> None:
    ids = [
        next(i for i in range(BYTE_LEVEL.vocab_size) if BYTE_LEVEL.token_bytes(i) == bytes([b])) for b in (0xED, 0xA0)
    ]
    assert "".join(stream(BYTE_LEVEL, ids, [], skip=False)) == "\ufffd\ufffd"


@settings(max_examples=300, deadline=None)
@given(data=st.data(), tokenizer=st.sampled_from(EXACT), skip=st.booleans(), step=st.integers(1, 4))
def test_stream_text_is_the_utf8_of_the_tokens_bytes(
    data: st.DataObject, tokenizer: Tokenizer, skip: bool, step: int
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    prompt = tokenizer.encode("x")
    shown = [index for index in ids if not (skip and tokenizer.is_special(index))]
    joined = b"".join(tokenizer.token_bytes(index) for index in shown)
    assert "".join(stream(tokenizer, ids, prompt, skip=skip, step=step)) == without_cut_tail(joined)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans(), step=st.integers(1, 4))
def test_byte_level_stream_equals_decode_but_for_a_cut_tail(data: st.DataObject, skip: bool, step: int) -> None:
    ids = data.draw(st.lists(st.integers(0, BYTE_LEVEL.vocab_size - 1), max_size=40))
    whole = BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    streamed = "".join(stream(BYTE_LEVEL, ids, [], skip=skip, step=step))
    assert whole.startswith(streamed)
    assert whole[len(streamed) :] in ("", "\ufffd")


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40), prompt=st.text(max_size=8), tokenizer=st.sampled_from(EXACT))
def test_valid_text_streams_as_decode_has_it_behind_the_prompt(text: str, prompt: str, tokenizer: Tokenizer) -> None:
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(text, add_special_tokens=False)
    both, before = tokenizer.decode([*prompt_ids, *ids]), tokenizer.decode(prompt_ids)
    assert "".join(stream(tokenizer, ids, prompt_ids)) == both[len(before) :]


@pytest.mark.parametrize("step", [1, 3])
def test_other_decoders_stream_through_a_window(step: int) -> None:
    text = "unbelievable story, told unbelievable"
    ids = WORD_PIECES.encode(text)
    assert "".join(stream(WORD_PIECES, ids, [], step=step)) == WORD_PIECES.decode(ids) == text
    assert "".join(stream(WORD_PIECES, ids[1:], ids[:1])) == text[len("un") :]


def test_each_token_costs_the_same_however_long_the_stream() -> None:
    for tokenizer in (BYTE_LEVEL, WORD_PIECES):
        ids = tokenizer.encode("unbelievable story ") * 1200
        detokenizer = Detokenizer(tokenizer, ids[:4])
        laps = []
        for start in range(0, len(ids), len(ids) // 4):
            began = time.perf_counter()
            for index in ids[start : start + len(ids) // 4]:
                detokenizer.push([index])
            laps.append(time.perf_counter() - began)
        assert laps[3] < 5 * laps[0] + 0.05


# --- chat templates ------------------------------------------------------------------------------------------------


def test_chat_is_rendered_with_and_without_the_generation_prompt() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    assert chat(CHATML).has_chat_template
    assert chat(CHATML).render_chat(messages, add_generation_prompt=False) == text
    assert chat(CHATML).render_chat(messages) == text + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}",
        "{{ messages[-1].content.split('#')[-1] }}!",
    ],
)
def test_continue_final_ends_with_the_last_content(template: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure, "}]
    text = chat(template).render_chat(messages, add_generation_prompt=False, continue_final=True)
    assert text.endswith("Sure, ")
    assert "\ufdd0" not in text


def test_continue_final_and_a_generation_prompt_exclude_each_other() -> None:
    with pytest.raises(InvalidRequestError, match="generation prompt"):
        render(CHATML, continue_final=True)


def test_continue_final_needs_a_template_that_shows_the_last_message() -> None:
    with pytest.raises(InvalidRequestError, match="can't be continued"):
        render("nothing", add_generation_prompt=False, continue_final=True)


def test_text_parts_are_joined_for_templates_that_want_text() -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    assert "user\nHi there<" in render(CHATML, parts)
    with pytest.raises(InvalidRequestError, match=r"messages\[0\].*'image_url'"):
        render(CHATML, [{"type": "image_url", "image_url": {}}])


def test_text_becomes_a_part_for_templates_that_only_know_parts() -> None:
    template = "{% for m in messages %}{% for part in m['content'] %}<{{ part.text }}>{% endfor %}{% endfor %}"
    assert render(template, "Hi") == "<Hi>"
    assert render(template, "Hi", add_generation_prompt=False, continue_final=True) == "<Hi"


def test_templates_have_what_they_are_written_for() -> None:
    assert render("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}") == "<s>Hi</s>"
    assert render("{{ {'b': '<é>', 'a': 1} | tojson }}") == '{"b": "<é>", "a": 1}'
    assert re.fullmatch(r"20\d\d", render("{{ strftime_now('%Y') }}"))
    assert render("{{ tools is none }}{{ flag }}", variables={"flag": 7, "self": 1, "index": 2}) == "True7"
    assert (
        render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ loop.last }}{% endfor %}")
        == "FalseFalse"
    )
    assert render("a\n    {% if true %}\nb\n    {% endif %}\nc") == "a\nb\nc"
    assert render("x{% generation %}{{ messages[0].content }}{% endgeneration %}y") == "xHiy"
    assert (
        render("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}")
        == "1"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ nothing.there }}", "undefined"),
        ("{% for %}", "does not compile"),
        ("{% include 'x' %}", "template"),
    ],
)
def test_a_template_that_fails_is_a_bad_request(template: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        render(template)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.__class__",
        "raise_exception.__globals__",
        "strftime_now.__globals__['__builtins__']",
        "cycler.__init__.__globals__.os",
        "self._TemplateReference__context",
        "'{0.__class__}'.format(messages)",
        "messages.append(1)",
        "messages[0].update({'a': 1})",
    ],
)
def test_the_sandbox_lets_nothing_out(expression: str) -> None:
    with contextlib.suppress(InvalidRequestError):
        assert render(f"{{{{ {expression} }}}}") == ""


def test_attribute_access_that_is_used_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="unsafe"):
        render("{{ messages.__class__.__mro__ }}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set s = messages[0].content %}{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_a_hostile_template_comes_to_an_end(template: str) -> None:
    began = time.perf_counter()
    with pytest.raises(InvalidRequestError):
        render(template, "x" * 5000)
    assert time.perf_counter() - began < 20


def test_no_template_says_what_to_do() -> None:
    assert not SENTENCEPIECE.has_chat_template
    with pytest.raises(InvalidRequestError, match=r"no chat template.*completions"):
        SENTENCEPIECE.render_chat([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("message", ["Hi", {"content": "Hi"}, {"role": 1}, {"role": "user", "content": 5}, None])
def test_malformed_messages_are_named(message: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"messages\[0\]"):
        chat(CHATML).render_chat([message])


def test_there_must_be_a_message() -> None:
    with pytest.raises(InvalidRequestError, match="at least one"):
        chat(CHATML).render_chat([])


def test_other_threads_go_on_while_a_long_text_is_read() -> None:
    """Otherwise one client's prompt of a megabyte stops every stream for seconds."""
    text = "The quick brown fox. " * 20_000
    begun, ended = threading.Event(), threading.Event()
    ids: list[int] = []

    def read() -> None:
        begun.set()
        ids.extend(BYTE_LEVEL.encode(text))
        ended.set()

    thread = threading.Thread(target=read)
    thread.start()
    begun.wait()
    turns = 0
    while not ended.wait(0.0005):
        turns += 1
    thread.join()
    assert turns > 5
    assert ids == BYTE_LEVEL._backend.encode(text).ids
    assert BYTE_LEVEL.decode(ids) == text
    with pytest.raises(InvalidRequestError):
        BYTE_LEVEL.encode("\ud800" + text)


def test_the_messages_are_no_variable() -> None:
    with pytest.raises(InvalidRequestError, match="no variable"):
        render(CHATML, variables={"messages": []})
