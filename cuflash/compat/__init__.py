"""In place of what a server has: other packages' functions under their own names and arguments, done by cuflash.

- :mod:`cuflash.compat.flash_attn_interface`: FlashAttention-3's interface of this name.
- :mod:`cuflash.compat.sgl_kernel`: what sglang's FlashAttention backend takes from its kernel package.

A server changes an import. Arrays may be torch's or of any other framework that speaks DLPack; torch's run on torch's
current stream, in memory of torch's allocator, and so inside of ``torch.cuda.graph``.

Scheduler metadata is theirs in kind: an int32 array that a server slices and copies into the buffer that its graph
reads. It is longer than theirs: :func:`scheduler_metadata_size` says how long. What it was made for is not in it. A
call takes the problem from its own shapes, so both functions must be given the same one (heads, head dims, dtype,
``max_seqlen_q``, ``num_splits``, ``sm_margin``), as with FlashAttention-3; lengths and masks may differ. An array that
cannot be for the call's problem is a ValueError where its size says so, and where its contents do: on the host always,
on a GPU under ``CUFLASH_VALIDATE=1``.
"""

from .plans import scheduler_metadata_size

__all__ = ["scheduler_metadata_size"]
