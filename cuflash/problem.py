"""Problem: everything about one attention problem but its data.

All public functions turn their arguments into a :class:`Problem` first. Here its scalars are checked and masks are
normalised, so that a plan and the call that uses it can never disagree about them; arrays are checked in
``arguments``.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, fields
from typing import Any

from .dtypes import QUANTISED_DTYPES, QUERY_DTYPES, dtype_name
from .mask import Mask, Shard

MAX_HEADDIM = 512
MAX_JOINT_HEADDIM = 576  # of keys whose first columns are the values
MAX_HEADS = 2**16
MAX_BATCH = 2**31 // 64
_INT32_MAX = 2**31 - 1
_MAX_RANKS = 2**16


@dataclass(frozen=True)
class Problem:
    """One attention problem without its data; hashable, compared field by field with the plan's.

    Attributes:
        batch_size: Number of sequences.
        max_seqlen_q: Query length, or the longest one with ``cu_seqlens_q``.
        num_heads_q: Query heads.
        num_heads_kv: KV heads; divides ``num_heads_q``.
        headdim: Elements of a query and key row.
        headdim_v: Elements of a value row.
        qkv_dtype: "float16", "bfloat16" or "float32"; "float8_e4m3fn" with a quantised cache.
        kv_dtype: Element type of the cache; ``qkv_dtype`` unless the cache is quantised.
        cu_seqlens_q: Whether queries are ragged.
        page_size: Keys per page, or None for a contiguous cache.
        window_size: Normalised (left, right); -1 is unbounded. A causal mask is a right bound of 0.
        attention_chunk: Chunk length, 0 without chunks.
        has_softcap: Whether scores are capped.
        num_splits: 0 balances freely, 1 never splits, n bounds the parts of an item.
        split_size: Keys per part in batch-invariant mode, or None.
        sm_margin: Multiprocessors left free.
        cp_world_size: Ranks that share every sequence (context parallelism).
        cp_rank: Whose keys the cache holds.
        cp_interleave: Neighbouring positions that a rank holds.
    """

    batch_size: int
    max_seqlen_q: int
    num_heads_q: int
    num_heads_kv: int
    headdim: int
    headdim_v: int
    qkv_dtype: str
    kv_dtype: str
    cu_seqlens_q: bool = False
    page_size: int | None = None
    window_size: tuple[int, int] = (-1, -1)
    attention_chunk: int = 0
    has_softcap: bool = False
    num_splits: int = 0
    split_size: int | None = None
    sm_margin: int = 0
    cp_world_size: int = 1
    cp_rank: int = 0
    cp_interleave: int = 1

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads_q // self.num_heads_kv

    @property
    def rows(self) -> int:
        """Packed query rows per KV head: (query position major, head minor)."""
        return self.max_seqlen_q * self.group

    @property
    def is_quantised(self) -> bool:
        """Whether the cache holds codes of 8 bits, which are to be multiplied by scales."""
        return self.kv_dtype in QUANTISED_DTYPES

    @property
    def is_joint(self) -> bool:
        """Whether values must be the first columns of the keys' own rows: what makes such long keys legal."""
        return self.headdim > MAX_HEADDIM

    @property
    def takes_qv(self) -> bool:
        """Whether a call may bring ``qv``, what of a query meets the values; a plan does not say whether one does."""
        return self.headdim <= 64 and self.headdim_v >= 256

    @property
    def out_dtype(self) -> str:
        """Element type of the output, of new keys and values, and of rotary tables."""
        return "bfloat16" if self.qkv_dtype in QUANTISED_DTYPES else self.qkv_dtype

    @property
    def mask(self) -> Mask:
        """Which keys a row sees."""
        left, right = self.window_size
        shard = Shard(self.cp_world_size, self.cp_rank, self.cp_interleave)
        return Mask(left, right, self.attention_chunk, shard)


def make_problem(
    batch_size: int,
    max_seqlen_q: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    *,
    qkv_dtype: Any = "bfloat16",
    kv_dtype: Any = None,
    headdim_v: int | None = None,
    cu_seqlens_q: bool = False,
    page_size: int | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    attention_chunk: int | None = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    split_size: int | None = None,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_interleave: int = 1,
) -> Problem:
    """Check scalar arguments and normalise the masks.

    Args:
        batch_size: Number of sequences.
        max_seqlen_q: Query length (longest one if ragged).
        num_heads_q: Query heads.
        num_heads_kv: KV heads.
        headdim: Elements of a query and key row: a multiple of 8 up to 512; up to 576 with shorter values, which then
            are the first columns of the keys.
        qkv_dtype: A string, NumPy or ml_dtypes dtype.
        kv_dtype: Element type of the cache, default ``qkv_dtype``; a quantised one has head dims of multiples of 16.
        headdim_v: Elements of a value row, default ``headdim``.
        cu_seqlens_q: Whether queries are ragged.
        page_size: Keys per page, None for a contiguous cache.
        causal: Bottom-right aligned causal mask.
        window_size: (left, right), -1 or None is unbounded; None for no window.
        attention_chunk: Chunk length, 0 or None for none.
        has_softcap: Whether scores are capped.
        num_splits: 0, 1 or an upper bound of parts per item.
        split_size: A multiple of 64, or None.
        pack_gqa: Accepted for compatibility; heads are always packed.
        sm_margin: Multiprocessors left free.
        cp_world_size: Ranks that share every sequence.
        cp_rank: This rank.
        cp_interleave: Neighbouring positions that a rank holds.

    Returns:
        The normalised problem.

    Raises:
        TypeError: For an argument of a wrong kind.
        ValueError: For a wrong value.
    """
    batch_size = integer("batch_size", batch_size, 0, MAX_BATCH)
    max_seqlen_q = integer("max_seqlen_q", max_seqlen_q, 0)
    num_heads_q = integer("num_heads_q", num_heads_q, 1, MAX_HEADS)
    num_heads_kv = integer("num_heads_kv", num_heads_kv, 1, MAX_HEADS)
    check_heads("num_heads_q", num_heads_q, "num_heads_kv", num_heads_kv)
    headdim, headdim_v = check_headdims("headdim", headdim, "headdim_v", headdim_v)
    q_name = dtype_name("qkv_dtype", qkv_dtype, QUERY_DTYPES)
    kv_name = q_name if kv_dtype is None else dtype_name("kv_dtype", kv_dtype)
    quantised = kv_name in QUANTISED_DTYPES
    if kv_name != q_name and not quantised:
        raise ValueError(f"kv_dtype must be the dtype of q ({q_name}) or a quantised one, got {kv_name}")
    for name, dim in (("headdim", headdim), ("headdim_v", headdim_v)):
        if quantised and dim % 16:
            raise ValueError(f"{name} must be a multiple of 16 with a cache of {kv_name}, got {dim}")
    if page_size is not None:
        page_size = integer("page_size", page_size, 1)
    attention_chunk = 0 if attention_chunk is None else integer("attention_chunk", attention_chunk, 0)
    num_splits = integer("num_splits", num_splits, 0)
    if split_size is not None:
        split_size = integer("split_size", split_size, 64)
        if split_size % 64:
            raise ValueError(f"split_size must be a multiple of 64, got {split_size}")
        if num_splits:
            raise ValueError(f"split_size and num_splits exclude each other, got split_size={split_size} and "
                             f"num_splits={num_splits}")  # fmt: skip
    left, right = window_bounds(window_size)
    # A right bound that can never hide a key is none: query i of sq sees keys up to i + sk - sq + right. The left one
    # stays: whether it hides keys depends on the lengths, which a plan may not rely on.
    right = 0 if boolean("causal", causal) else right
    right = -1 if right >= max_seqlen_q - 1 else right
    boolean("has_softcap", has_softcap)
    if pack_gqa is not None:
        boolean("pack_gqa", pack_gqa)
    return Problem(
        batch_size=batch_size,
        max_seqlen_q=max_seqlen_q,
        num_heads_q=num_heads_q,
        num_heads_kv=num_heads_kv,
        headdim=headdim,
        headdim_v=headdim_v,
        qkv_dtype=q_name,
        kv_dtype=kv_name,
        cu_seqlens_q=bool(cu_seqlens_q),
        page_size=page_size,
        window_size=(left, right),
        attention_chunk=attention_chunk,
        has_softcap=bool(has_softcap),
        num_splits=num_splits,
        split_size=split_size,
        sm_margin=integer("sm_margin", sm_margin, 0),
        cp_world_size=(world := integer("cp_world_size", cp_world_size, 1, _MAX_RANKS)),
        cp_rank=integer("cp_rank", cp_rank, 0, world - 1),
        cp_interleave=integer("cp_interleave", cp_interleave, 1, _INT32_MAX // world),
    )


def first_difference(plan: Problem, call: Problem) -> tuple[str, Any, Any] | None:
    """Return (field, planned, called) of the first field in which two problems differ, or None."""
    if plan == call:
        return None
    for field in fields(Problem):
        planned, called = getattr(plan, field.name), getattr(call, field.name)
        if planned == called:
            continue
        is_causal = [problem.window_size[1] == 0 for problem in (plan, call)]
        if field.name == "window_size" and is_causal[0] != is_causal[1]:
            return "causal", is_causal[0], is_causal[1]
        return field.name, planned, called
    return None


def integer(name: str, value: Any, low: int, high: int = _INT32_MAX) -> int:
    """Return ``value`` as an int in [low, high], or raise naming the argument."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if not low <= number <= high:
        rule = f"at least {low}" if high == _INT32_MAX and number < low else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {rule}, got {number}")
    return number


def boolean(name: str, value: Any) -> bool:
    """Return ``value`` as a bool, or raise naming the argument."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def real(name: str, value: Any) -> float:
    """Return ``value`` as a finite float, or raise naming the argument."""
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None
    except OverflowError:  # an int beyond all floats
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def factor(name: str, value: Any) -> float:
    """Return ``value`` as a float that kernels multiply by, or raise naming the argument."""
    number = real(name, value)
    if number and not 2.0**-126 <= abs(number) <= 2.0**127:  # kernels take smaller numbers for 0
        raise ValueError(f"{name} must be 0 or between 2**-126 and 2**127 in size, got {number}")
    return number


def cap(softcap: Any) -> float:
    """Return the cap of the scores, 0 for none; None says none, too."""
    number = 0.0 if softcap is None else real("softcap", softcap)
    if number < 0:
        raise ValueError(f"softcap must be at least 0, got {number}")
    return number


def check_heads(name: str, heads: int, kv_name: str, heads_kv: int, hint: str = "") -> None:
    """Refuse query heads that KV heads cannot be shared by, naming the arguments."""
    if not heads_kv or not heads or heads % heads_kv:
        raise ValueError(f"{name} must be a multiple of {kv_name}={heads_kv}, got {heads}{hint}")


def check_headdims(name: str, headdim: Any, name_v: str, headdim_v: Any) -> tuple[int, int]:
    """Return head dims that kernels can handle, of values as of keys where None is given, or raise naming them."""
    dim = integer(name, headdim, 8, MAX_JOINT_HEADDIM)
    if dim > MAX_HEADDIM and headdim_v is None:
        raise ValueError(f"{name} must be at most {MAX_HEADDIM} unless values are shorter than keys, got {dim}")
    dim_v = dim if headdim_v is None else integer(name_v, headdim_v, 8, MAX_HEADDIM)
    for which, number in ((name, dim), (name_v, dim_v)):
        if number % 8:
            raise ValueError(f"{which} must be a multiple of 8, got {number}")
    return dim, dim_v


def window_bounds(window_size: Any) -> tuple[int, int]:
    """Return the bounds of a window as given, -1 for none; None, for the pair or for a bound, says none, too."""
    if window_size is None:
        return -1, -1
    if isinstance(window_size, (str, bytes)):
        raise TypeError(f"window_size must be a pair (left, right), got {window_size!r}")
    try:
        pair = tuple(window_size)
    except TypeError:
        raise TypeError(f"window_size must be a pair (left, right), got {type(window_size).__name__}") from None
    if len(pair) != 2:
        raise ValueError(f"window_size must be a pair (left, right), got {len(pair)} values")
    left, right = (
        -1 if bound is None else integer(f"window_size[{side}]", bound, -1) for side, bound in enumerate(pair)
    )
    return left, right
