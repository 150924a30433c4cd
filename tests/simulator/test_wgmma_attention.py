"""A pipelined attention loop of warpgroups: right and without findings in every order, and bugs planted in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simulated import ORDERS, found, run
from wgmma_attention import CODE, arguments, source

from cuflash.simulator import SimModule


def compiled(headdim: int, keys: int, groups: int, code: str = CODE) -> Any:
    return SimModule(source(headdim, keys, groups, code), name="wgmma_attention.cu").get_function("attention")


@pytest.mark.parametrize("settings", ORDERS)
@pytest.mark.parametrize("headdim, keys, groups", [(64, 64, 1), (128, 64, 1), (128, 128, 2)])
def test_attention(headdim: int, keys: int, groups: int, settings: dict[str, Any]) -> None:
    kernel = compiled(headdim, keys, groups)
    for tiles in (1, 2, 5):
        args, shared, wanted = arguments(headdim, keys, groups, tiles)
        run(kernel, 1, 128 + 128 * groups, args, shared_mem=shared, **settings)
        np.testing.assert_allclose(args[3], wanted, atol=2e-3)


BUGS = {  # text: its replacement, the check
    "FENCE;  // values": ("", "warpgroup"),
    "FENCE;  // scores": ("", "warpgroup"),
    "PROXY;  // values": ("", "proxy"),
    "PROXY;  // scores": ("", "proxy"),
    "WAIT(1);  // for the scores": ("WAIT(2);", "warpgroup"),
    "WAIT(0);  // for the values": ("WAIT(1);", "warpgroup"),
    "give_back(empty_v, j);": ("", "deadlock"),
    "        softmax();\n        WAIT(0);": (
        "        softmax(); give_back(empty_v, j); if (0)\n WAIT(0);",
        "warpgroup",
    ),
    "u32 40": ("u32 48", "registers"),
}


@pytest.mark.parametrize("settings", ORDERS)
@pytest.mark.parametrize("where", BUGS)
def test_planted_bugs(where: str, settings: dict[str, Any]) -> None:
    what, check = BUGS[where]
    assert CODE.count(where) == 1
    args, shared, _ = arguments(64, 64, 1, 6)
    finding = found(compiled(64, 64, 1, CODE.replace(where, what)), 1, 256, args, shared_mem=shared, **settings)
    assert finding.check == check, finding


@pytest.mark.parametrize("settings", ORDERS)
def test_a_tile_given_back_too_early(settings: dict[str, Any]) -> None:
    wait, given = "        WAIT(0);  // for the values\n        pin(o);\n", "        give_back(empty_v, j);\n"
    assert wait + given in CODE
    args, shared, _ = arguments(64, 64, 1, 6)
    kernel = compiled(64, 64, 1, CODE.replace(wait + given, given + wait))
    assert found(kernel, 1, 256, args, shared_mem=shared, **settings).check == "shared_race"
