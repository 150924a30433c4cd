"""Check and measure everything on a GPU, in one go: ``python tests/gpu/run.py``.

Parts that check run side by side, parts that measure have the machine for themselves afterwards. Every part has its own
time limit; what fails or hangs does not keep the others from running. The output of all parts goes to a log, the end of
what failed and a summary to the terminal. The exit code is 0 if nothing failed, 1 if something did, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
HERE = "tests/gpu"
_OUTCOMES = {0: "ok", 5: "skipped"}  # by exit code; 5 is pytest's where nothing could run
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default")


@dataclass(frozen=True)
class Part:
    """One thing to run.

    Attributes:
        name: How it is selected.
        command: What runs.
        seconds: Its time limit.
        alone: Whether it measures: nothing else runs then.
        shows: Whether all of its output is shown in the end.
        needs: A program without which it is skipped.
    """

    name: str
    command: tuple[str, ...]
    seconds: int
    alone: bool = False
    shows: bool = False
    needs: str = ""


def parts(folder: Path, workers: int) -> list[Part]:
    """Return all parts in their order; results go to ``folder``."""

    def tests(processes: int, *what: str) -> tuple[str, ...]:
        shared = processes > 1 and importlib.util.find_spec("xdist")
        return (*PYTEST, *(("-n", str(processes)) if shared else ()), *what)

    python = sys.executable
    bench = (python, "-m", "tests.bench", "gpu")
    files = {file.stem.removeprefix("test_gpu_"): file for file in sorted((ROOT / HERE).glob("test_gpu_*.py"))}
    quick = ("cuDNN", "FA2", "JAX", "FlashInfer", "FA3")  # flex_attention compiles for long
    return [
        Part("info", (python, "-m", "cuflash", "info"), 60, shows=True),
        Part("tests", tests(workers, "tests", "-m", "gpu", f"--ignore={HERE}"), 240),
        *(Part(name, tests(workers // 4, str(file)), 180) for name, file in files.items()),
        *(
            Part(tool, (python, f"{HERE}/sanitize.py", "--under", tool, *options), 240, needs="compute-sanitizer")
            for tool, options in (
                ("memcheck", ()), ("initcheck", ()),
                ("racecheck", ("--without-wgmma", "--without-meetings")),
                ("synccheck", ("--without-wgmma", "--without-clusters")),
            )
        ),
        Part("counters", (python, f"{HERE}/counters.py"), 100, alone=True, shows=True, needs="ncu"),
        Part(
            "bench",
            (*bench, "--markdown", "--save", str(folder / "bench.json"), "--seconds", "200", "--peers", *quick),
            270, alone=True, shows=True,
        ),
        Part(
            "flex",
            (*bench, "--save", str(folder / "flex.json"), "--seconds", "60", "--peers", "flex", "--shapes", "b1 L"),
            100, alone=True, shows=True,
        ),
    ]  # fmt: skip


class Running:
    """A part that has begun."""

    def __init__(self, part: Part, folder: Path, deadline: float) -> None:
        environment = {"CUFLASH_CACHE_DIR": str(folder / "simulator"), **os.environ}
        environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "PYTHONUNBUFFERED": "1"}
        environment.pop("CUFLASH_BACKEND", None)
        self.part, self.start = part, time.monotonic()
        self.deadline = min(deadline, self.start + part.seconds)
        self._log = folder / f".{part.name}.log"
        self._output: IO[bytes] = self._log.open("wb")
        self._process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=self._output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def result(self) -> Result | None:
        """Return how it went once it has ended, or must."""
        code = self._process.poll()
        if code is None:
            if time.monotonic() < self.deadline:
                return None
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._output.close()
        text = self._log.read_text(errors="replace")
        self._log.unlink()
        outcome = "out of time" if code is None else _OUTCOMES.get(code, f"failed ({code})")
        return Result(self.part, outcome, time.monotonic() - self.start, text)


@dataclass(frozen=True)
class Result:
    """How a part went."""

    part: Part
    outcome: str
    seconds: float
    output: str

    @property
    def last_line(self) -> str:
        """What it said last."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return lines[-1][:100] if lines else ""


def run(chosen: list[Part], folder: Path, deadline: float) -> list[Result]:
    """Run parts; returns their results in the order of the parts."""
    results: dict[str, Result] = {}

    def done(result: Result) -> None:
        results[result.part.name] = result
        with (folder / "log.txt").open("a") as log:
            log.write(f"===== {result.part.name}: {result.outcome}\n{result.output}\n")
        print(f"{result.part.name:10} {result.outcome}, {result.seconds:.0f} s", flush=True)

    possible = []
    for part in chosen:
        if part.needs and shutil.which(part.needs) is None:
            done(Result(part, "skipped", 0.0, f"{part.needs} is not installed"))
        else:
            possible.append(part)
    for group in ([part for part in possible if not part.alone], *([part] for part in possible if part.alone)):
        running = [Running(part, folder, deadline) for part in group]
        while running:
            time.sleep(0.2)
            for part in list(running):
                result = part.result()
                if result is not None:
                    running.remove(part)
                    done(result)
    return [results[part.name] for part in chosen]


def has_gpu() -> bool:
    """Whether CuPy sees a GPU; asked in another process, which holds no context then."""
    code = "import sys, cupy; sys.exit(not cupy.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def main() -> int:
    """Run what the arguments name."""
    names = [part.name for part in parts(Path(), 1)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what to run (default: all): {', '.join(names)}")
    parser.add_argument("--out", type=Path, help="folder for log.txt and bench.json (default: a new one)")
    parser.add_argument("--seconds", type=float, default=570, help="time limit of all parts together (default: 570)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that run tests")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - set(names))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(names)}")
    if not has_gpu():
        print("no GPU found: these checks and measurements need one, and CuPy")
        return 2
    deadline = time.monotonic() + arguments.seconds
    folder = (arguments.out or Path(tempfile.mkdtemp(prefix="cuflash-gpu-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    every = parts(folder, arguments.workers)
    results = run([p for p in every if not arguments.parts or p.name in arguments.parts], folder, deadline)

    for result in results:
        if result.outcome not in ("ok", "skipped"):
            print(f"\n===== the end of {result.part.name}, {result.outcome}\n{result.output[-1500:].strip()}")
    for result in results:
        if result.part.shows and result.outcome == "ok":
            print(f"\n===== {result.part.name}\n{result.output.strip()[-7000:]}")
    print("\n===== summary")
    for result in results:
        print(f"{result.part.name:10} {result.outcome:12} {result.seconds:5.0f} s  {result.last_line}")
    print(f"all output: {folder / 'log.txt'}")
    shutil.rmtree(folder / "simulator", ignore_errors=True)
    return int(any(result.outcome not in ("ok", "skipped") for result in results))


if __name__ == "__main__":
    sys.exit(main())
