"""Decoded modules, kept in the cache folder so that a warm start neither parses nor decodes."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from functools import lru_cache

from .cache import digest, find, keep
from .compile import sources
from .decode import UnsupportedInstruction, decode
from .program import Program
from .ptx import Symbol, parse

__all__ = ["Image", "load_image"]


@dataclass
class Image:
    """A module's variables and kernels.

    Attributes:
        symbols: global and constant variables.
        programs: decoded kernels by name.
        errors: why a kernel could not be decoded.
    """

    symbols: dict[str, Symbol]
    programs: dict[str, Program] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def program(self, name: str) -> Program:
        """A kernel.

        Raises:
            KeyError: if there is no such kernel.
            UnsupportedInstruction: if it has an instruction that the machine does not know.
        """
        if name in self.errors:
            raise UnsupportedInstruction(self.errors[name])
        return self.programs[name]


@lru_cache(maxsize=None)
def _decoder_version() -> str:
    return digest(sources(".py"))


def load_image(text: str, handlers: tuple[str, ...], cached: bool = True) -> Image:
    """Parses and decodes PTX, or finds the result in the cache.

    Args:
        text: the PTX.
        handlers: names of the machine's handlers, in their order.
        cached: False for PTX that is not worth keeping, such as a mutant.

    Returns:
        The module.
    """
    name = f"image-{digest(text, handlers, _decoder_version())}.pickle"
    found = find(name) if cached else None
    if found is not None:
        try:
            image = pickle.loads(found[1])
            if isinstance(image, Image):
                return image
        except Exception:  # whole, but written by another version of Python or NumPy
            pass
    module = parse(text)
    image = Image({k: s for k, s in module.symbols.items() if s.space in ("global", "const")})
    numbers = {handler: k for k, handler in enumerate(handlers)}
    for kernel, function in module.functions.items():
        if not function.entry:
            continue
        try:
            image.programs[kernel] = decode(module, kernel, numbers)
        except UnsupportedInstruction as error:
            image.errors[kernel] = str(error)
    if cached:
        keep(name, pickle.dumps(image, protocol=pickle.HIGHEST_PROTOCOL))
    return image
