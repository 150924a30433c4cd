"""From parsed PTX to the instructions of the machine in `engine.cpp`."""

from __future__ import annotations

from collections.abc import Mapping

from . import decode_arithmetic, decode_memory, decode_warp, decode_warpgroup  # noqa: F401  they register their rules
from .decoder import Decoder, UnsupportedInstruction
from .program import INS, Program
from .ptx import Module

__all__ = ["INS", "Program", "UnsupportedInstruction", "decode"]


def decode(module: Module, name: str, op_index: Mapping[str, int]) -> Program:
    """Decodes one kernel of a module.

    Args:
        module: a parsed PTX module.
        name: the entry's name.
        op_index: the machine's handlers by name.

    Returns:
        The program.

    Raises:
        UnsupportedInstruction: for an instruction that the machine does not know.
    """
    function = module.functions[name]
    decoder = Decoder(module, function)
    decoder.decode()
    return decoder.program(op_index)
