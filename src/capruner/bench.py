"""Latency of ONNX models in several engines, measured in turns."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ENGINES = ("onnxruntime", "deepsparse", "openvino")
WORKER = Path(__file__).with_name("bench_worker.py")


class Worker:
    """One engine with one model, in a process of its own that waits for its turns."""

    def __init__(self, engine: str, model: Path, batch_size: int, threads: int, python: str) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "NM_DISABLE_ANALYTICS": "1",
            "NM_DISABLE_TELEMETRY": "1",
        }
        command = [python, str(WORKER), engine, str(model), str(batch_size), str(threads)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.trouble = self._answer().get("error")
        self._pause()

    def turn(self, seconds: float) -> float:
        """Median seconds of one inference."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        latency = float(self._answer()["latency"])
        self._pause()
        return latency

    def _pause(self) -> None:
        # Threads of an engine that waits for work may spin, and would take the time of the one whose turn it is.
        self._process.send_signal(signal.SIGSTOP)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # engines print banners too
            if line.startswith("@"):
                return dict(json.loads(line[1:]))
        assert self._process.stderr is not None
        last = self._process.stderr.read().strip().splitlines()[-1:] or ["the process ended"]
        return {"error": last[0][:200]}

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def measure(
    models: Sequence[Path],
    engines: Sequence[str],
    batch_sizes: Sequence[int],
    rounds: int,
    seconds: float,
    threads: int,
    pythons: Mapping[str, str],
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every model in every engine at every batch size.

    Returns:
        Rows (model, engine, batch_size, latency_ms, low_ms and high_ms: quartiles over rounds, images_per_second, speedup: median over rounds of the
        reference's latency in the same round over this one's), and why engines were not measured. The reference is the first model in the first
        engine that runs.
    """
    rows: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    for batch_size in batch_sizes:
        workers: dict[tuple[str, Path], Worker] = {}
        try:
            for engine in engines:
                for model in models if engine not in missing else ():
                    worker = Worker(engine, model, batch_size, threads, pythons.get(engine, sys.executable))
                    if worker.trouble:
                        missing[engine] = worker.trouble
                        worker.close()
                        break
                    workers[engine, model] = worker
            times: dict[tuple[str, Path], list[float]] = {key: [] for key in workers}
            for _ in range(rounds):
                for key, worker in workers.items():
                    times[key].append(worker.turn(seconds))
        finally:
            for worker in workers.values():
                worker.close()
        reference = next(iter(times.values()), [])
        for (engine, model), found in times.items():
            low, _, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
            rows.append(
                {
                    "model": str(model),
                    "engine": engine,
                    "batch_size": batch_size,
                    "latency_ms": 1e3 * statistics.median(found),
                    "low_ms": 1e3 * low,
                    "high_ms": 1e3 * high,
                    "images_per_second": batch_size / statistics.median(found),
                    "speedup": statistics.median(a / b for a, b in zip(reference, found)),
                }
            )
    return rows, missing
