"""Other libraries' decode attention, each where it is installed: a class per library.

To add one, derive it from :class:`Peer` (or :class:`TorchPeer`) and name it in ``PEERS``.
"""

from .base import MOST_ERROR, NotForThis, Peer, reason
from .flash_attention import FlashAttention3
from .flashinfer import FlashInfer, FlashInferFa2, FlashInferXqa
from .flashmla import FlashMla
from .jax_cudnn import JaxCudnn
from .torch_sdpa import TorchCudnn, TorchFlash, TorchFlex

__all__ = ["MOST_ERROR", "PEERS", "NotForThis", "Peer", "reason"]

PEERS: dict[str, type[Peer]] = {
    peer.name: peer
    for peer in (
        TorchCudnn,
        TorchFlash,
        TorchFlex,
        JaxCudnn,
        FlashInfer,
        FlashInferFa2,
        FlashInferXqa,
        FlashAttention3,
        FlashMla,
    )
}
