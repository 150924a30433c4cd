"""``CUFLASH_LOG`` writes calls down, and ``cuflash replay`` runs them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import BACKENDS, on
from problems import Backend
from test_bad_input import appending_ragged, contiguous, paged, planning, ragged

import cuflash
from cuflash import journal
from cuflash.cli import main


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
    assert capsys.readouterr().out.count("line ") == len(written)
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


def test_errors_are_written(log: Path, capsys: Any) -> None:
    with pytest.raises(ValueError, match="softcap"):
        cuflash.flash_attn_with_kvcache(**contiguous(), softcap=-1.0)
    (line,) = lines(log)
    assert line["error"] == "ValueError: softcap must be at least 0, got -1.0"
    assert main(["replay", str(log)]) == 1
    assert "softcap must be at least 0" in capsys.readouterr().out


def test_the_standard_error(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("CUFLASH_LOG", "stderr")
    cuflash.get_scheduler_metadata(**planning())
    assert json.loads(capsys.readouterr().err)["arguments"]["num_heads_q"] == 4


def test_strides_and_gaps_are_rebuilt() -> None:
    array = np.zeros((3, 5, 4, 8), np.float16)[:, ::2].swapaxes(1, 2)
    again = journal.rebuilt(journal._described(array), np, np.random.default_rng(0))
    assert (again.shape, again.strides, again.dtype) == (array.shape, array.strides, array.dtype)


def test_nothing_is_kept_when_nobody_asks(monkeypatch: Any) -> None:
    monkeypatch.delenv("CUFLASH_LOG", raising=False)
    monkeypatch.setattr(journal, "write", None)
    cuflash.get_scheduler_metadata(**planning())
    assert not journal.launches


@pytest.mark.parametrize("text", ["nonsense", "{}", '{"call": "os.system", "arguments": {}}'])
def test_other_files(text: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "log").write_text(text)
    with pytest.raises(SystemExit):
        main(["replay", str(tmp_path / "log")])
    assert "line 1 must be" in capsys.readouterr().err
