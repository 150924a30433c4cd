"""``python -m tests.bench compare`` without a GPU: its cases on NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from bench import compare, main
from bench.compare import Case
from test_bench_peers import Host

from cuflash.bench.measure import Machine

SMALL: dict[str, Callable[[Machine], Case]] = {
    "tree": partial(compare.tree, batch=3, keys=70, nodes=35),
    "prefix": partial(compare.prefix, batch=4, groups=2, keys=32, own=5),
    "top": partial(compare.top, batch=2, keys=150, chosen=40, heads=4),
    "mixed": partial(compare.mixed, batch=3, keys=40, chunk=17, chunk_keys=50),
}


@pytest.fixture(autouse=True)
def every_copy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUFLASH_BACKEND", "auto")
    monkeypatch.setattr(compare, "number_of_calls", lambda expected_us, copies: copies)


@pytest.mark.parametrize("name", SMALL)
def test_every_way_is_right_and_timed(name: str) -> None:
    case = SMALL[name](Host())
    records = list(compare.measure(name, case, Host(), rounds=1))
    assert [record["variant"] for record in records] == list(case.ways)
    assert all(record["us"] > 0 and record["rel_error"] < 5e-3 for record in records)
    assert records[-1]["to_last"] == 1
    for record in records:
        assert record["to_floor"] == pytest.approx(record["us"] / record["floor_us"])


@pytest.mark.parametrize("name", SMALL)
def test_a_way_that_is_wrong_is_not_timed(name: str) -> None:
    case = SMALL[name](Host())
    for way in case.ways:
        idle = Case(case.shapes, case.copies, case.out, {way: lambda i: None}, case.answers)
        with pytest.raises(ArithmeticError, match=f"{way} is wrong: relative error nan"):
            list(compare.measure(name, idle, Host(), rounds=1))
    if name == "tree":
        chain = Case(case.shapes, case.copies, case.out, {"tree, bool": case.ways["causal"]}, case.answers)
        with pytest.raises(ArithmeticError, match="tree, bool is wrong"):
            list(compare.measure(name, chain, Host(), rounds=1))


def test_floors() -> None:
    """A shared prefix counts once a group, a mixed step as its two parts, chosen keys as they are."""
    row = 8 * 256 * 2
    bytes_of = {name: sum(shape.kv_bytes for shape in make(Host()).shapes) for name, make in SMALL.items()}
    assert bytes_of == {
        "tree": 3 * 70 * row, "prefix": (2 * 32 + 4 * 5) * row, "top": 2 * 40 * 576 * 2, "mixed": (3 * 40 + 50) * row
    }  # fmt: skip


def test_trees() -> None:
    mask = compare.random_trees(4, 40)
    assert mask[:, np.arange(40), np.arange(40)].all() and not np.triu(mask, 1).any() and mask[:, :, 0].all()
    assert len(np.unique(mask.sum(-1))) > 4  # of many depths
    words = compare.packed(mask)
    assert words.shape == (4, 40, 2) and words.dtype == np.uint32
    j = np.arange(40)
    np.testing.assert_array_equal(words[..., j // 32] >> (j % 32).astype(np.uint32) & 1, mask)


def test_unknown_cases(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--cases", "nonsense"])
    assert ended.value.code == 2
    assert "--cases must name some of tree of 64, b8 L4096; " in " ".join(capsys.readouterr().err.split())
