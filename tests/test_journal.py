"""``CUFLASH_LOG`` writes calls down, and ``cuflash replay`` runs them again."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import test_plan_mismatch
from conftest import BACKENDS, on
from problems import Backend
from test_bad_input import appending_ragged, contiguous, paged, planning, ragged
from test_plan_mismatch import OF_THE_PLAN, OTHERS

import cuflash
from cuflash import journal
from cuflash.cli import main
from cuflash.dtypes import numpy_dtype


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUFLASH_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("make", [contiguous, paged, ragged, appending_ragged], ids=lambda make: make.__name__)
@pytest.mark.parametrize("planned", [False, True], ids=["", "planned"])
def test_calls_are_written_and_run_again(make: Any, planned: bool, log: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("CUFLASH_BACKEND", "numpy")
    arguments = make()
    if planned:
        options = {name: arguments[name] for name in ("cu_seqlens_q", "cu_seqlens_k_new") if name in arguments}
        plan = planning() | options | {"cache_seqlens": arguments["cache_seqlens"]}
        plan |= {"max_seqlen_q": arguments.get("max_seqlen_q", 2), "page_size": 16 if make is paged else None}
        arguments["scheduler_metadata"] = cuflash.get_scheduler_metadata(**plan)
    cuflash.flash_attn_with_kvcache(**arguments)
    written = lines(log)
    assert [line["call"] for line in written] == ["get_scheduler_metadata"] * planned + ["flash_attn_with_kvcache"]
    described = written[-1]["arguments"]
    assert described["cache_seqlens"]["values"] == [40, 7, 80]
    assert described["q"]["shape"] == list(arguments["q"].shape) and "values" not in described["q"]
    assert main(["replay", str(log)]) == 0
    out = capsys.readouterr().out
    assert out.count("line ") == len(written) and " on auto" not in out  # which names no backend
    assert len(lines(log)) == len(written)  # a replay is not written down


@pytest.mark.parametrize("backend", [on(name) for name in BACKENDS if name != "numpy"], indirect=True)
def test_launches_are_written(backend: Backend, log: Path, capsys: Any) -> None:
    """Of the first call, and of one that is remembered."""
    given = {name: backend.to_native(x) for name, x in paged().items()}
    for _ in range(2):
        cuflash.flash_attn_with_kvcache(**given)
    for line in lines(log):
        assert any(kernel.startswith("plan") for kernel in line["launches"])
        assert any("<<<" in kernel and "HEADDIM" in kernel.upper().replace("_", "") for kernel in line["launches"])
    assert main(["replay", str(log), "--line", "-1"]) == 0
    assert "off the NumPy backend by" in capsys.readouterr().out


def test_other_calls_are_not_written(log: Path) -> None:
    """As ``notebooks/semantics.md`` says."""
    plan = cuflash.get_scheduler_metadata(**planning())
    before = len(lines(log))
    rows, starts = np.ones((6, 2, 64), np.float32), np.array([0, 2, 6], np.int32)
    out, lse = cuflash.flash_attn_varlen_func(rows, rows, rows, starts, starts, 4, 4, return_softmax_lse=True)
    cuflash.merge_attn_states([out, out], [lse, lse])
    cuflash.compile(plan)
    assert len(lines(log)) == before == 1


def test_errors_are_written(log: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match="softcap"):
        cuflash.flash_attn_with_kvcache(**contiguous(), softcap=-1.0)
    (line,) = lines(log)
    assert line["error"] == "ValueError: softcap must be at least 0, got -1.0"
    assert main(["replay", str(log)]) == 1
    assert "softcap must be at least 0" in capsys.readouterr().out


@pytest.mark.parametrize("field", OTHERS)
def test_mismatches_fail_as_they_did(field: str, log: Path, capsys: Any) -> None:
    """Of a plan and its call, whatever the shapes of their lengths are."""
    plan = test_plan_mismatch.plan(**OTHERS[field][1])
    with pytest.raises(ValueError, match="scheduler_metadata was made for") as raised:
        test_plan_mismatch.attend(plan, **{field: OF_THE_PLAN[field]} if field in OF_THE_PLAN else {})
    assert main(["replay", str(log), "--line", "-1"]) == 1
    assert " ".join(capsys.readouterr().out.split()).startswith(f"line 2: ValueError: {raised.value} then: ")


def test_a_ragged_call_on_the_plan_of_another(log: Path, capsys: Any) -> None:
    """More queries than the plan says, in another number of sequences."""
    arguments = ragged()
    for options in ({"max_seqlen_q": 1}, {"batch_size": 2, "cache_seqlens": np.array([7, 9], np.int32)}):
        starts = np.arange(len(options.get("cache_seqlens", arguments["cache_seqlens"])) + 1, dtype=np.int32)
        plan = cuflash.get_scheduler_metadata(**planning() | {"cu_seqlens_q": starts} | options)
        with pytest.raises(ValueError, match="scheduler_metadata was made for") as raised:
            cuflash.flash_attn_with_kvcache(**arguments, scheduler_metadata=plan)
        assert main(["replay", str(log), "--line", "-1"]) == 1
        assert f"ValueError: {raised.value} then: " in " ".join(capsys.readouterr().out.split())


SMALL = {"q": np.ones((2, 1, 4, 64), np.float32), "k_cache": np.ones((2, 9, 2, 64), np.float32)}
JOINT = np.ones((2, 9, 1, 576), np.float16)


@pytest.mark.parametrize(
    "arguments",
    [
        SMALL | {"v_cache": SMALL["k_cache"], "softmax_scale": np.float32(0.1), "cache_seqlens": np.int64(5)},
        SMALL | {"v_cache": SMALL["k_cache"], "causal": np.bool_(True), "num_splits": np.int64(2)},
        SMALL | {"v_cache": SMALL["k_cache"].copy(), "cache_seqlens": np.array([5, 7], np.int8)},
        SMALL | {"v_cache": SMALL["k_cache"].copy(), "cache_batch_idx": np.array([1, 0], np.uint8)},
        SMALL | {name: np.ones((2, 9, 2, 64), ml_dtypes.float8_e4m3fn) for name in ("k_cache", "v_cache")},
        SMALL | {name: np.ones((2, 9, 2, 64), ml_dtypes.float8_e5m2) for name in ("k_cache", "v_cache")},
        {"q": JOINT[:, :1].repeat(4, 2), "k_cache": JOINT, "v_cache": JOINT[..., :512]},
        {"q": JOINT[:, :1, :, :64], "kv_dtype": np.int8}
        | {name: np.ones((2, 9, 1, 64), np.int8) for name in ("k_cache", "v_cache")},
    ],
    ids=["numbers", "bools", "int8", "uint8", "e4m3fn", "e5m2", "joint", "dtype"],
)  # fmt: skip
def test_whatever_runs_runs_again(arguments: dict[str, Any], log: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("CUFLASH_BACKEND", "numpy")
    cuflash.flash_attn_with_kvcache(**arguments)
    assert main(["replay", str(log)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("pack_gqa", [None, True, False])
def test_a_plan_that_says_how_heads_are_packed(pack_gqa: bool | None, log: Path, capsys: Any) -> None:
    plan = cuflash.get_scheduler_metadata(**planning(), pack_gqa=pack_gqa)
    cuflash.flash_attn_with_kvcache(**contiguous(), pack_gqa=pack_gqa, scheduler_metadata=plan)
    assert main(["replay", str(log)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("kind", ["class", "ml_dtypes", "torch"])
def test_plans_of_any_spelling_run_again(kind: str, log: Path, capsys: Any) -> None:
    torch = pytest.importorskip("torch") if kind == "torch" else None
    dtype = {"class": np.float16, "ml_dtypes": ml_dtypes.bfloat16, "torch": getattr(torch, "bfloat16", None)}[kind]
    cuflash.get_scheduler_metadata(**planning() | {"qkv_dtype": dtype})
    assert main(["replay", str(log)]) == 0, capsys.readouterr().out


def test_joint_rows_stay_joint(log: Path) -> None:
    keys = np.ones((2, 9, 1, 96), np.float16)
    cuflash.flash_attn_with_kvcache(keys[:, :1].repeat(4, 2), keys, keys[..., :64], sinks=np.ones(4, np.float32))
    (line,) = lines(log)
    again = journal.all_rebuilt(line["arguments"], np, np.random.default_rng(0))
    assert again["v_cache"].shape == (2, 9, 1, 64)
    assert again["v_cache"].__array_interface__["data"] == again["k_cache"].__array_interface__["data"]


@pytest.mark.parametrize("place", ["none/log", "."])
def test_a_log_that_cannot_be_written(place: str, tmp_path: Path, monkeypatch: Any) -> None:
    """The call is done all the same: its caller has nothing else of it, and the cache has been appended to."""
    monkeypatch.setenv("CUFLASH_LOG", str(tmp_path / place))
    arguments = SMALL | {"v_cache": SMALL["k_cache"].copy(), "out": np.full_like(SMALL["q"], np.nan)}
    with pytest.warns(RuntimeWarning, match="^CUFLASH_LOG must name what can be written, got "):
        assert cuflash.flash_attn_with_kvcache(**arguments) is arguments["out"]


class Full:
    def write(self, text: str) -> None:
        raise OSError("No space left on device")


@pytest.mark.parametrize("kind", ["none", "closed", "full"])
def test_a_standard_error_that_cannot_be_written(kind: str, monkeypatch: Any) -> None:
    """Of a call that returns, and of one that fails: its own error is what the caller gets."""
    (closed := io.StringIO()).close()
    monkeypatch.setenv("CUFLASH_LOG", "stderr")
    monkeypatch.setattr(sys, "stderr", {"none": None, "closed": closed, "full": Full()}[kind])
    with pytest.warns(RuntimeWarning, match="^CUFLASH_LOG must name what can be written, got stderr: "):
        assert cuflash.get_scheduler_metadata(**planning()).problem.num_heads_q == 4
    with pytest.warns(RuntimeWarning), pytest.raises(ValueError, match="num_splits"):
        cuflash.get_scheduler_metadata(**planning() | {"num_splits": -1})


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CUFLASH_LOG", "~/log")
    cuflash.get_scheduler_metadata(**planning())
    assert len(lines(tmp_path / "log")) == 1


def test_the_standard_error(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("CUFLASH_LOG", "stderr")
    cuflash.get_scheduler_metadata(**planning())
    assert json.loads(capsys.readouterr().err)["arguments"]["num_heads_q"] == 4


def test_a_replay_on_cuda_needs_a_gpu(log: Path, capsys: Any, monkeypatch: Any) -> None:
    for _ in range(2):
        cuflash.get_scheduler_metadata(**planning())
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(SystemExit) as raised:
        main(["replay", str(log), "--backend", "cuda"])
    captured = capsys.readouterr()
    assert raised.value.code == 2 and not captured.out
    assert "backend cuda needs a GPU and CuPy: CuPy is not installed" in " ".join(captured.err.split())


@pytest.mark.parametrize("dtype", ["bool", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex128"])
@pytest.mark.parametrize("batch", [0, 3])
def test_strides_and_gaps_are_rebuilt(batch: int, dtype: str) -> None:
    array = np.zeros((batch, 5, 4, 8), numpy_dtype(dtype))[:, ::2].swapaxes(1, 2)
    again = journal.rebuilt(journal._described(array), np, np.random.default_rng(0))
    assert (again.shape, again.strides, again.dtype) == (array.shape, array.strides, array.dtype)


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_kept_when_nobody_asks(value: str | None, monkeypatch: Any) -> None:
    monkeypatch.delenv("CUFLASH_LOG", raising=False)
    if value is not None:
        monkeypatch.setenv("CUFLASH_LOG", value)
    monkeypatch.setattr(journal, "write", None)
    cuflash.get_scheduler_metadata(**planning())
    assert not journal.launches


@pytest.mark.parametrize(
    "text",
    ["nonsense", "{}", '{"call": "os.system", "arguments": {}}', "[" * 10**5,
     '{"call": "flash_attn_with_kvcache", "arguments": [1]}', '{"call": "get_scheduler_metadata", "arguments": null}'],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_other_files(text: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "log").write_text(text)
    with pytest.raises(SystemExit):
        main(["replay", str(tmp_path / "log")])
    assert "line 1 must be" in capsys.readouterr().err
