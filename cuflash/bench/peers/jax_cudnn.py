"""JAX's ``dot_product_attention`` with cuDNN, on contiguous caches of equal lengths."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..inputs import Inputs
from ..timing import JaxProgram, Sampler
from .base import NotForThis, Peer


class JaxCudnn(Peer):
    """One program of many calls; JAX has no events, so its figure is wall time."""

    name = "JAX"
    modules = ("jax",)
    install = 'pip install "jax[cuda13]"'
    ragged = False
    causal_queries = False

    def prepare(self, inputs: Inputs) -> None:
        """Take the arrays over."""
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes most of the GPU's memory
        self.jax = importlib.import_module("jax")
        if self.jax.default_backend() != "gpu":
            raise NotForThis("needs a JAX with CUDA")
        copies = [inputs.contiguous(i) for i in range(len(inputs.copies))]
        self.copies = [tuple(self.jax.dlpack.from_dlpack(x) for x in copy) for copy in copies]

    def function(self, *copy: Any) -> Any:
        """Trace a call."""
        return self.jax.nn.dot_product_attention(*copy, implementation="cudnn")

    def run(self, i: int) -> Any:
        """Call it once."""
        return self.jax.jit(self.function)(*self.copies[i % len(self.copies)])

    def answer(self) -> NDArray[Any]:
        """Return the output for the first copy."""
        return np.asarray(self.run(0).astype(np.float32))

    def sampler(self, calls: int) -> Sampler:
        """Compile calls to one program, fewer than a graph has: it takes long to compile."""
        count = max(20, len(self.copies))
        return JaxProgram(self.jax, self.function, [self.copies[i % len(self.copies)] for i in range(count)])
