"""Time models in several engines, each pair of engine and model in its own process.

The processes take turns, so that a slow phase of the machine hits all alike. Reported is the median over rounds of the ratio of two turns in the same round.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capruner.deploy import engines, mnn

ENGINES = tuple(engines.ENGINES)
TORCH_ENGINES = ("torch", "semi_structured")


@dataclass(frozen=True)
class Subject:
    """One set of weights.

    Attributes:
        name: in the table.
        onnx: for engines that read ONNX.
        checkpoint: for torch.
        sparsity: fraction of zeros in the weights of linear and convolution layers, or None.
    """

    name: str
    onnx: Path | None
    checkpoint: Path | None = None
    sparsity: float | None = None


@dataclass(frozen=True)
class BenchConfig:
    """What all turns share.

    Attributes:
        shape: of one image.
        threads: per engine.
        rounds: turns per pair.
        seconds: length of a turn.
        pythons: ``{engine: interpreter}`` for engines that are installed in another environment.
        options: dtype (for torch and OpenVINO; default float32); for torch model, kwargs, device, compile.
    """

    shape: Sequence[int]
    threads: int = 2
    rounds: int = 7
    seconds: float = 1.0
    pythons: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def python(self, engine: str) -> str:
        """The interpreter for ``engine``."""
        return self.pythons.get(engine, sys.executable)


class Worker:
    """One engine with one set of weights, in a process that waits for its turns.

    Attributes:
        trouble: why it cannot run, or None.
        note: the engine's version and precision.
    """

    def __init__(self, engine: str, file: Path, batch_size: int, config: BenchConfig) -> None:
        job = {
            "engine": engine,
            "file": str(file),
            "batch": batch_size,
            "shape": list(config.shape),
            "threads": config.threads,
            "options": dict(config.options),
        }
        environment = {
            "OMP_NUM_THREADS": str(config.threads),
            "NM_DISABLE_ANALYTICS": "1",  # DeepSparse would upload usage data
            "PYTHONSAFEPATH": "1",  # else modules beside the worker could hide packages of the same names
        }
        self._process = subprocess.Popen(
            [config.python(engine), "-W", "ignore", engines.__file__, json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environment,
        )
        answer = self._answer()
        self.trouble, self.note = answer.get("error"), answer.get("note", "")
        self._pause()

    def _pause(self) -> None:
        # Idle threads of an engine may spin (DeepSparse's do) and take time from the engine whose turn it is.
        self._process.send_signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> float:
        """Median seconds of one batch over a turn; raise ``RuntimeError`` if the engine has stopped."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "latency" not in answer:
            raise RuntimeError(f"an engine stopped while it was measured: {answer['error']}")
        self._pause()
        return float(answer["latency"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        last = "the process ended without output"
        for line in self._process.stdout:  # engines print banners and warnings too
            if line.startswith("@"):
                return dict(json.loads(line[1:]))
            last = line.strip() or last
        return {"error": last[:300]}

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def measure(
    subjects: Sequence[Subject], engines: Sequence[str], batch_sizes: Sequence[int], config: BenchConfig
) -> dict[str, Any]:
    """Time every set of weights in every engine at every batch size.

    Returns:
        JSON values. ``rows``: engine, model, sparsity, batch_size, latency_ms, low_ms and high_ms (median and quartiles over rounds), images_per_second,
        ``speedup`` over the reference, which is the first weights in the first engine that runs, ``speedup_same_engine`` over the first weights in this
        engine (quartiles of both as _low and _high; None where they did not run), rounds_ms; ``not_measured`` {engine: why}; ``versions`` {engine: text}.

    Raises:
        RuntimeError: an engine stopped while it was measured.
    """
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="capruner-bench-") as folder:
        files = _files(subjects, engines, config, Path(folder), missing)
        for batch_size in batch_sizes:
            workers: dict[tuple[str, Subject], Worker] = {}
            try:
                for engine, subject in files:
                    _start(engine, subject, files[engine, subject], batch_size, config, workers, missing, versions)
                times: dict[tuple[str, Subject], list[float]] = {key: [] for key in workers}
                keys = list(workers)
                for number in range(config.rounds):
                    first = number % max(len(keys), 1)  # so that no pair always follows the same one
                    for key in keys[first:] + keys[:first]:
                        times[key].append(workers[key].turn(config.seconds))
            finally:
                for worker in workers.values():
                    worker.close()
            rows += [_row(key, batch_size, times, subjects[0]) for key in times]
    return {"rows": rows, "not_measured": missing, "versions": versions}


def _files(
    subjects: Sequence[Subject], engines: Sequence[str], config: BenchConfig, folder: Path, missing: dict[str, str]
) -> dict[tuple[str, Subject], Path]:
    """The file that each pair reads; engines without one are in ``missing``."""
    files = {}
    for engine in engines:
        for number, subject in enumerate(subjects):
            file = subject.checkpoint if engine in TORCH_ENGINES else subject.onnx
            if engine in missing or (engine == "semi_structured" and subject.sparsity == 0):
                continue
            if file is None:
                missing[engine] = "needs checkpoints and --model, not ONNX files"
                continue
            try:
                converted = folder / f"{number}.mnn"
                files[engine, subject] = (
                    mnn.convert(file, converted, config.python(engine)) if engine == "mnn" else file
                )
            except (ModuleNotFoundError, RuntimeError) as error:
                missing[engine] = str(error)
    return files


def _start(
    engine: str,
    subject: Subject,
    file: Path,
    batch_size: int,
    config: BenchConfig,
    workers: dict[tuple[str, Subject], Worker],
    missing: dict[str, str],
    versions: dict[str, str],
) -> None:
    """Add a worker, or the reason why there is none to ``missing``."""
    if engine in missing:
        return
    worker = Worker(engine, file, batch_size, config)
    if worker.trouble:
        missing[engine] = worker.trouble
        worker.close()
        for key in [key for key in workers if key[0] == engine]:
            workers.pop(key).close()
        return
    workers[engine, subject] = worker
    versions[engine] = worker.note


def _row(
    key: tuple[str, Subject], batch_size: int, times: Mapping[tuple[str, Subject], Sequence[float]], first: Subject
) -> dict[str, Any]:
    engine, subject = key
    low, middle, high = quartiles(times[key])
    row: dict[str, Any] = {
        "engine": engine,
        "model": subject.name,
        "sparsity": subject.sparsity,
        "batch_size": batch_size,
        "latency_ms": 1e3 * middle,
        "low_ms": 1e3 * low,
        "high_ms": 1e3 * high,
        "images_per_second": batch_size / middle,
        "rounds_ms": [1e3 * t for t in times[key]],
    }
    same = "torch" if engine in TORCH_ENGINES else engine
    for name, other in (("speedup", next(iter(times))), ("speedup_same_engine", (same, first))):
        ratios = [a / b for a, b in zip(times.get(other, []), times[key])]
        low_, middle_, high_ = quartiles(ratios) if ratios else (None, None, None)
        row |= {f"{name}_low": low_, name: middle_, f"{name}_high": high_}
    return row


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile of one value or more, between the values."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, statistics.median(values), high
