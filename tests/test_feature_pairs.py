"""Every two of the newer features together, and each with what there was before, against the reference.

Cases that use a feature that the library lacks (cases.FEATURES) are left out.
"""

from __future__ import annotations

from typing import Any

import pytest
from cases import FEATURES, KV_DTYPES, Case, features_of, kernel_of
from problems import Backend, all_pairs, check, first_pairs, make_inputs
from test_attention import APPENDS, MASKS, QUERIES, SPLITS

Choice = dict[str, Any]
FORMS = ["none", "float", "one", "heads", "keys"]
CACHES: dict[str, Choice] = {
    "contiguous": {},
    "rows": {"batch_idx": True},
    "pages of 1": {"page_size": 1},
    "pages of 16": {"page_size": 16},
    "pages of 64": {"page_size": 64, "batch_idx": True},
    "list of pages": {"page_size": 3, "csr": True},
    "list, rows": {"page_size": 16, "csr": True, "batch_idx": True},
    "negative pages": {"page_size": 16, "negative_pages": True},
}
ROTARY: dict[str, Choice] = {
    "none": {},
    "interleaved": {"rotary": "interleaved", "rotary_dim": 16},
    "half": {"rotary": "half", "rotary_dim": 32, "rotary_seqlens": True},
}
SHARED: dict[str, list[Any]] = {
    "mask": list(MASKS),
    "queries": list(QUERIES),
    "append": list(APPENDS),
    "splits": list(SPLITS),
    "layout": ["NHD", "HND"],
    "plan": ["none", "given", "stale", "reused"],
    "sinks": [False, True],
    "softcap": [0.0, 3.0],
    "leftpad": [False, True],
    "rotary": list(ROTARY),
    "seqlens": [(77, 1, 130), (0, 64, 15), (16, 199, 63)],
}
QUANTISED: dict[str, list[Any]] = SHARED | {
    "kv_dtype": list(KV_DTYPES),
    "dtype": ["float16", "bfloat16", "float32", "float8_e4m3fn"],
    "q_scale": FORMS[:-1],
    "k_scale": FORMS,
    "v_scale": FORMS,
    "as_uint8": [False, True],
    "strided": [False, True],
    "headdim": [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (32, 48)],
    "heads": [(2, 2), (4, 2), (7, 1), (8, 1), (16, 1), (32, 1)],
    "cache": list(CACHES),
}
MLA: dict[str, list[Any]] = SHARED | {
    "latent": [("joint", (576, 512)), ("joint", (320, 256)), ("joint", (96, 64)), ("qv", (64, 512)), ("qv", (64, 256)),
               ("qv row", (64, 512))],
    "heads": [(1, 1), (8, 1), (12, 1), (16, 1), (32, 1), (64, 1), (96, 1), (128, 1), (4, 2)],
    "queries": ["one", "few", "ragged", "ragged, none"],
    "dtype": ["float16", "bfloat16"],
    "kv_dtype": [None, "float8_e4m3fn", "int8"],
    "k_scale": FORMS,
    "cache": list(CACHES),
    "seqlens": [(77, 1, 130), (0, 64, 15)],
}  # fmt: skip
SERVING: dict[str, list[Any]] = SHARED | {
    "tree": [None, "bool", "words"],
    "merge": [False, True, "in place"],
    "cp": [(1, 0, 1), (2, 1, 1), (3, 0, 16), (8, 5, 64)],
    "unowned": [(0, 0), (2, 3)],
    "cache": list(CACHES),
    "kv_dtype": [None, "float8_e5m2"],
    "latent": [None, ("joint", (96, 64))],
    "dtype": ["bfloat16", "float32"],
}


def is_valid(choice: Choice) -> bool:
    """Whether the contract lets all of it meet."""
    latent, ragged = choice.get("latent"), "ragged" in choice["queries"]
    room = latent[1][0] - (latent[1][1] if latent[0] == "joint" else 0) if latent else choice.get("headdim", (64,))[0]
    return not (
        (choice["rotary"] != "none" and (choice["append"] == "none" or room < ROTARY[choice["rotary"]]["rotary_dim"]))
        or (choice.get("tree") and (choice["mask"] != "none" or choice["rotary"] != "none"))
        or (choice.get("cp", (1, 0, 1))[0] > 1 and choice["leftpad"])
        or (choice.get("unowned", (0, 0)) != (0, 0) and not ragged)
        or (choice.get("q_scale", "none") != "none" and choice["dtype"] != "float8_e4m3fn")
        or (choice.get("k_scale", "none") != "none" and choice["kv_dtype"] is None)
    )


def case_of(choice: Choice, seed: int) -> Case:
    choice = dict(choice)
    options: Choice = {"seed": seed}
    for name, values in {"mask": MASKS, "queries": QUERIES, "append": APPENDS, "splits": SPLITS, "cache": CACHES,
                         "rotary": ROTARY}.items():  # fmt: skip
        options |= values[choice.pop(name)]
    latent = choice.pop("latent", None)
    if latent:
        options |= {"mla": latent[0], "headdim": latent[1]}
    scales = [choice.pop(f"{name}_scale", "none") for name in "qkv"]
    if latent and latent[0] != "joint":
        scales[2] = scales[1]
    return Case(**options | choice, scales=tuple(scales))  # type: ignore[arg-type]


def cases(axes: dict[str, list[Any]]) -> list[Case]:
    """Return cases in which every two values meet, of those that the library can do."""
    if not FEATURES:
        return []
    first = {name: values[0] for name, values in axes.items()}

    def is_there(name: str, value: Any) -> bool:
        return features_of(case_of(first | {name: value}, 0)) - features_of(case_of(first, 0)) <= FEATURES

    there = {name: [value for value in values if is_there(name, value)] for name, values in axes.items()}
    choices = all_pairs(there, is_valid, lambda choice: kernel_of(case_of(choice, 0)))
    made = [case_of(choice, seed) for seed, choice in enumerate(choices)]
    return [case for case in made if features_of(case) <= FEATURES]


@pytest.mark.parametrize("case", first_pairs(cases(QUANTISED), 0.3, 45))
def test_quantised(case: Case, backend: Backend) -> None:
    """Every element, form of scales, head dim class, mask, cache and append."""
    check(case, make_inputs(case), backend)


@pytest.mark.parametrize("case", first_pairs(cases(MLA), 0.3, 8))
def test_mla(case: Case, backend: Backend) -> None:
    """Every spelling, number of heads, queries, pages, masks, quantised or not."""
    check(case, make_inputs(case), backend)


@pytest.mark.parametrize("case", first_pairs(cases(SERVING), 0.3, 45))
def test_serving(case: Case, backend: Backend) -> None:
    """Trees, lists of pages, merging, ranks, rows of nobody."""
    check(case, make_inputs(case), backend)
