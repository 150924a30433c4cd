"""A step of a model on a paged cache: planned once, then called per layer."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

import cuflash  # the public functions, by their public names

from .array_types import Array, ArrayT
from .memo import Rest
from .memory import NativeArray
from .paged import PagedKVCache
from .pages import integers
from .problem import cap, check_heads, integer, make_problem
from .public import is_written_down
from .step_shape import StepArrays, StepShape

# Steps of equally many tokens have a plan for each number up to this. Prompts may have any length: steps with more are
# ragged and planned for a power of two, so that there are few plans.
_MOST_DENSE = 16


class DecodeStep:
    """Attention of one step after the other on a :class:`~cuflash.PagedKVCache`.

    A step is ``begin`` (pages, lengths, the plan), a call per layer, and ``commit``. It may bring one token for each of
    its sequences (decoding), several (drafts, of which ``PagedKVCache.truncate`` takes back the rejected ones), whole
    prompts or chunks of them, or all of that at once.

    Plans and index arrays are kept per shape of a step and refilled in place. So a CUDA graph of a step's calls stays
    right for all later steps of that shape: pad batches to a few sizes with ``batch_size=``, and replay it between
    ``begin`` and ``commit``. With ``out=`` a call allocates nothing and waits for nothing.

    What the calls of a layer have in common is read once: the cache's arrays, which stay the same for its life, and the
    arguments here. What they hold may change, but they must not be replaced by others.

    Models whose layers differ in their masks have an object per mask: ``begin`` all, ``commit`` one.

    Args:
        cache: The cache.
        num_heads_q: Query heads.
        causal: Whether a token sees none behind itself.
        window_size: (left, right) tokens around itself that a token sees, -1 for all.
        attention_chunk: A token sees its own chunk of this many; 0 for no chunks.
        softcap: Scores become ``softcap * tanh(score / softcap)``; 0 for none.
        softmax_scale: Factor of the scores; default ``headdim ** -0.5``.
        rotary_cos: (positions, rotary_dim / 2) rotates q and k, in the arrays' memory.
        rotary_sin: The same.
        rotary_interleaved: Rotate pairs (0, 1), (2, 3) .. instead of (0, rotary_dim / 2) ..
        num_splits: As in ``get_scheduler_metadata``.
        split_size: As in ``get_scheduler_metadata``: results independent of the batch.
        sm_margin: As in ``get_scheduler_metadata``.

    Example:
        >>> import cuflash, numpy as np
        >>> cache = cuflash.PagedKVCache(2, 32, 16, 1, 64, "float32")
        >>> step = cuflash.DecodeStep(cache, 4)
        >>> a, b = cache.add(), cache.add()
        >>> def run(tokens):
        ...     q, k, v = (np.ones((tokens, heads, 64), np.float32) for heads in (4, 1, 1))
        ...     return [step(layer, q, k, v) for layer in range(2)][-1].shape
        >>> step.begin([a, b], [30, 5])  # two prompts
        DecodeStep(2 sequences, up to 32 tokens each)
        >>> run(35)
        (35, 4, 64)
        >>> step.commit()
        >>> step.begin([a, b], 3)  # three drafts each, of which one is right
        DecodeStep(2 sequences, 3 tokens each)
        >>> run(6)
        (6, 4, 64)
        >>> step.commit()
        >>> cache.truncate([a, b], [31, 6])
        >>> cache.seqlens([a, b]).tolist()
        [31, 6]
    """

    def __init__(
        self,
        cache: PagedKVCache,
        num_heads_q: int,
        *,
        causal: bool = True,
        window_size: tuple[int | None, int | None] | None = (-1, -1),
        attention_chunk: int | None = 0,
        softcap: float | None = 0.0,
        softmax_scale: float | None = None,
        rotary_cos: Array | None = None,
        rotary_sin: Array | None = None,
        rotary_interleaved: bool = True,
        num_splits: int = 0,
        split_size: int | None = None,
        sm_margin: int = 0,
    ) -> None:
        if not isinstance(cache, PagedKVCache):
            raise TypeError(f"cache must be a PagedKVCache, got {type(cache).__name__}")
        self.cache = cache
        num_heads_q = integer("num_heads_q", num_heads_q, 1)
        check_heads("num_heads_q", num_heads_q, "the cache's num_heads_kv", cache.num_heads_kv)
        mask = {"causal": causal, "window_size": window_size, "attention_chunk": attention_chunk}
        kv_dtype = cache.kv_dtype if cache.is_quantised else None
        planned: dict[str, Any] = mask | {
            "num_heads_q": num_heads_q, "num_heads_kv": cache.num_heads_kv, "headdim": cache.headdim,
            "headdim_v": cache.headdim_v, "qkv_dtype": cache.dtype, "kv_dtype": kv_dtype, "page_size": cache.page_size,
            "has_softcap": cap(softcap) > 0, "num_splits": num_splits, "split_size": split_size, "sm_margin": sm_margin,
        }  # fmt: skip
        make_problem(1, 1, **planned)  # raises what every step would
        self._planned = planned | {"max_seqlen_k": cache.max_seqlen}
        self._called: dict[str, Any] = mask | {
            "kv_dtype": kv_dtype, "softcap": softcap, "softmax_scale": softmax_scale, "rotary_cos": rotary_cos,
            "rotary_sin": rotary_sin, "rotary_interleaved": rotary_interleaved,
        }  # fmt: skip
        keys, values = (cache.num_heads_kv, cache.headdim), (cache.num_heads_kv, cache.headdim_v)
        self._rows = {"q": (num_heads_q, keys[1]), "k": keys, "v": values, "out": (num_heads_q, values[1])}
        self._all_arrays: dict[StepShape, StepArrays] = {}
        self._arrays: StepArrays | None = None
        self._open: tuple[NDArray[Any], NDArray[Any], NDArray[Any]] | None = None

    @property
    def meta(self) -> cuflash.SchedulerMetadata:
        """The plan of this step."""
        return self._begun.meta

    @property
    def batch_size(self) -> int:
        """Sequences of this step, with those that take no part."""
        return self._begun.shape.batch_size

    @property
    def cache_seqlens(self) -> NativeArray:
        """(batch_size,) int32 lengths before the step, as kernels read them."""
        return self._begun.cache_seqlens

    def begin(
        self,
        sequences: ArrayLike,
        num_tokens: ArrayLike = 1,
        *,
        batch_size: int | None = None,
        max_seqlen_q: int | None = None,
    ) -> DecodeStep:
        """Begin a step: give its sequences the pages that they need, fill lengths and tables, and plan.

        A step that is not committed can be begun anew. If a step cannot be planned, there is none, and its sequences
        keep their pages, as after ``PagedKVCache.extend``.

        Args:
            sequences: Handles of those that take part.
            num_tokens: New tokens of each of them, or one number for all.
            batch_size: Sequences that the step is made for, if more than take part: the others bring no tokens, append
                nothing, and give 0. For CUDA graphs, which are made for one batch size.
            max_seqlen_q: Most new tokens of a sequence, for steps that are ragged whatever they bring: for CUDA graphs
                of such. By default a step is ragged if its own numbers differ or are above 16, and planned for a power
                of two.

        Returns:
            Itself.

        Raises:
            OutOfPages: If there are too few free pages; nothing has changed.
            ValueError: For an unknown sequence, more sequences than ``batch_size``, more tokens than ``max_seqlen_q``.
        """
        handles, tokens = np.atleast_1d(integers("sequences", sequences)), integers("num_tokens", num_tokens)
        if tokens.shape not in ((), handles.shape):
            raise ValueError(f"num_tokens must be one number or one per sequence ({len(handles)}), got {tokens.shape}")
        most = int(tokens.max(initial=0))
        if most < 1:
            raise ValueError(f"num_tokens must be at least 1 for one sequence, got {tokens.tolist()}")
        ragged = max_seqlen_q is not None or most > _MOST_DENSE or bool((tokens != most).any())
        shape = StepShape(
            len(handles) if batch_size is None else integer("batch_size", batch_size, len(handles)),
            integer("max_seqlen_q", max_seqlen_q, most) if max_seqlen_q is not None
            else 1 << (most - 1).bit_length() if ragged else most,
            ragged,
            batch_size is not None,
        )  # fmt: skip
        tokens = np.broadcast_to(tokens, handles.shape)
        self.cache.extend(handles, tokens)

        self.cache.upload()
        arrays = self._all_arrays.get(shape)
        if arrays is None:
            arrays = self._all_arrays[shape] = StepArrays(shape, self.cache.xp)
        seqlens = self.cache.seqlens(handles)
        self._arrays, self._open = arrays, None  # the step before is gone, and this one stands when it is planned
        arrays.fill(seqlens, self.cache.rows(handles), tokens)
        self.plan()
        self._open = handles, seqlens, tokens
        return self

    def plan(self) -> None:
        """Plan again, for ``cache_seqlens`` as they stand. ``begin`` does it.

        For a CUDA graph that advances ``cache_seqlens`` on the GPU and is replayed for many steps: reserve pages with
        ``PagedKVCache.extend``, ``begin``, and capture this with the calls.
        """
        arrays = self._begun
        arrays.meta = cuflash.get_scheduler_metadata(
            batch_size=arrays.shape.batch_size,
            max_seqlen_q=arrays.shape.max_seqlen_q,
            max_seqlen_k_new=0 if arrays.cu_seqlens_k_new is not None else arrays.shape.max_seqlen_q,
            cache_seqlens=arrays.cache_seqlens,
            cu_seqlens_q=arrays.cu_seqlens_q,
            cu_seqlens_k_new=arrays.cu_seqlens_k_new,
            out=arrays.meta,
            **self._planned,
        )

    @overload
    def __call__(
        self, layer: int, q: ArrayT, k: Array, v: Array | None = ..., *, sinks: Array | None = ...,
        out: Array | None = ..., softmax_lse: Array | None = ..., return_softmax_lse: Literal[False] = ...,
    ) -> ArrayT: ...  # fmt: skip
    @overload
    def __call__(
        self, layer: int, q: ArrayT, k: Array, v: Array | None = ..., *, sinks: Array | None = ...,
        out: Array | None = ..., softmax_lse: Array | None = ..., return_softmax_lse: Literal[True],
    ) -> tuple[ArrayT, Any]: ...  # fmt: skip
    @overload
    def __call__(
        self, layer: int, q: ArrayT, k: Array, v: Array | None = ..., *, sinks: Array | None = ...,
        out: Array | None = ..., softmax_lse: Array | None = ..., return_softmax_lse: bool,
    ) -> ArrayT | tuple[ArrayT, Any]: ...  # fmt: skip
    def __call__(
        self,
        layer: int,
        q: ArrayT,
        k: Array,
        v: Array | None = None,
        *,
        sinks: Array | None = None,
        out: Array | None = None,
        softmax_lse: Array | None = None,
        return_softmax_lse: bool = False,
    ) -> Any:
        """Write the keys and values of a layer's new tokens to the cache, and attend.

        Args:
            layer: The layer.
            q: (tokens, heads_q, headdim) queries of all new tokens, one sequence behind the other; rotated here if the
                step has a rotary table. Ragged steps may have more rows than tokens; others, of n tokens each, have
                ``batch_size * n``, those of sequences that take part first.
            k: (tokens, heads_kv, headdim) keys, likewise.
            v: (tokens, heads_kv, headdim_v) values, likewise; None for a latent cache.
            sinks: (heads_q,) learnable logits of the layer.
            out: Where to write the output.
            softmax_lse: Where to write the LSE.
            return_softmax_lse: Whether to return the LSE too.

        Returns:
            (tokens, heads_q, headdim_v), with ``return_softmax_lse`` also the LSE, (heads_q, tokens) of a ragged step,
            else (batch_size, heads_q, n).

        Raises:
            ValueError: Without a step: before ``begin``, or after ``commit``.
        """
        if self._open is None:
            raise ValueError("a call must lie between begin() and commit()")
        shape = self._begun.shape
        given = {
            "q": q, "k": k, "v": v, "sinks": sinks, "out": out, "softmax_lse": softmax_lse,
            "return_softmax_lse": return_softmax_lse,
        }  # fmt: skip
        rest = self._rest(layer)
        result = rest.afresh(given, self._view) if is_written_down() else rest(given, self._view)
        attended, lse = result if return_softmax_lse else (result, None)
        attended, lse = shape.results(given, attended, lse)
        return (attended, lse) if return_softmax_lse else attended

    def _view(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return arguments of a call as ``flash_attn_with_kvcache`` takes them."""
        return self._begun.shape.view(given, self._rows)

    def _rest(self, layer: int) -> Rest:
        """Return the arguments that all calls of a layer have in common, for steps of this shape."""
        arrays, cache = self._begun, self.cache
        if type(layer) is not int:
            layer = integer("layer", layer, 0)
        rest = arrays.rests.get(layer)
        if rest is None:
            layer = integer("layer", layer, 0, cache.num_layers - 1)
            called = self._called | {
                "k_cache": cache.k[layer],
                "v_cache": cache.v[layer],
                "cache_seqlens": arrays.cache_seqlens,
                "cache_batch_idx": arrays.cache_batch_idx,
                "page_table": cache.page_table,
                "cu_seqlens_q": arrays.cu_seqlens_q,
                "cu_seqlens_k_new": arrays.cu_seqlens_k_new,
                "max_seqlen_q": arrays.shape.max_seqlen_q if arrays.shape.ragged else None,
                "k_descale": None if cache.k_scale is None else cache.k_scale[layer],
                "v_descale": None if cache.v_scale is None else cache.v_scale[layer],
                "scheduler_metadata": arrays.meta,
            }
            rest = arrays.rests[layer] = Rest(cuflash.flash_attn_with_kvcache, called)
        return rest

    def commit(self) -> None:
        """End the step: its tokens belong to the sequences.

        Raises:
            ValueError: Without a step, or if one of its sequences has changed since it began.
        """
        if self._open is None:
            raise ValueError("commit() must follow begin()")
        self.cache.advance(*self._open)
        self._open = None

    @property
    def _begun(self) -> StepArrays:
        if self._arrays is None:
            raise ValueError("begin() must come first")
        return self._arrays

    def __repr__(self) -> str:
        if self._arrays is None:
            return "DecodeStep(not begun)"
        shape = self._arrays.shape
        return f"DecodeStep({shape.batch_size} sequences, {'up to ' * shape.ragged}{shape.max_seqlen_q} tokens each)"
