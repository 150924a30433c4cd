"""Decoded modules, kept in the cache folder so that a warm start neither parses nor decodes."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from .compile import cache_dir, digest, store
from .decode import Program, UnsupportedInstruction, decode
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
    return digest(*(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py"))))


def load_image(text: str, handlers: tuple[str, ...], cached: bool = True) -> Image:
    """Parses and decodes PTX, or finds the result in the cache.

    Args:
        text: the PTX.
        handlers: names of the machine's handlers, in their order.
        cached: False for PTX that is not worth keeping, such as a mutant.

    Returns:
        The module.
    """
    path = cache_dir() / f"image-{digest(text, handlers, _decoder_version())}.pickle"
    if cached:
        try:
            image = pickle.loads(path.read_bytes())
            if isinstance(image, Image):
                return image
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError):
            pass
    module = parse(text)
    image = Image({k: s for k, s in module.symbols.items() if s.space in ("global", "const")})
    numbers = {name: k for k, name in enumerate(handlers)}
    for name, function in module.functions.items():
        if not function.entry:
            continue
        try:
            image.programs[name] = decode(module, name, numbers)
        except UnsupportedInstruction as error:
            image.errors[name] = str(error)
    if cached:
        store(path, pickle.dumps(image, protocol=pickle.HIGHEST_PROTOCOL))
    return image
