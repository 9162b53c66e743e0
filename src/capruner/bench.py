"""How long models take in several engines: every pair in a process of its own, in turns, so that a machine that slows down slows all alike.

What is reported is the median over rounds of the ratio of two turns of the same round.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ENGINES = ("torch", "semi_structured", "onnxruntime", "deepsparse", "openvino")
TORCH_ENGINES = ENGINES[:2]
WORKER = Path(__file__).with_name("bench_worker.py")


@dataclass(frozen=True)
class Subject:
    """One set of weights.

    Attributes:
        name: in the table.
        onnx: for the engines that read ONNX.
        checkpoint: for torch.
        sparsity: share of zeros in the weights of Linear and convolution layers, or None.
    """

    name: str
    onnx: Path | None
    checkpoint: Path | None = None
    sparsity: float | None = None


@dataclass(frozen=True)
class Settings:
    """What all turns share.

    Attributes:
        shape: of one image.
        threads: of each engine.
        rounds: turns that each pair gets.
        seconds: length of a turn.
        pythons: ``{engine: interpreter}`` for engines that live in another environment.
        options: dtype (of torch and OpenVINO; float32 if left out); for torch model, kwargs, device, compile.
    """

    shape: Sequence[int]
    threads: int = 2
    rounds: int = 7
    seconds: float = 1.0
    pythons: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


class Worker:
    """One engine with one set of weights, in a process that waits for its turns.

    Attributes:
        trouble: why it cannot run, or None.
        note: the engine's version and what is particular, in words.
    """

    def __init__(self, engine: str, subject: Subject, batch_size: int, settings: Settings) -> None:
        job = {
            "engine": engine,
            "file": str(subject.checkpoint if engine in TORCH_ENGINES else subject.onnx),
            "batch": batch_size,
            "shape": list(settings.shape),
            "threads": settings.threads,
            "options": dict(settings.options),
        }
        environment = {
            "OMP_NUM_THREADS": str(settings.threads),
            "NM_DISABLE_ANALYTICS": "1",  # DeepSparse would call home
            "PYTHONSAFEPATH": "1",  # else the modules beside the worker could be taken for others of the same names
        }
        self._process = subprocess.Popen(
            [settings.pythons.get(engine, sys.executable), "-W", "ignore", str(WORKER), json.dumps(job)],
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
        # Threads of an engine that waits for work may spin (DeepSparse's do), and would take the time of the one whose turn it is.
        self._process.send_signal(signal.SIGSTOP)

    def turn(self, seconds: float) -> float:
        """Median seconds of one batch over a turn.

        Raises:
            RuntimeError: the engine has given up.
        """
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
        last = "the process ended without a word"
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
    subjects: Sequence[Subject], engines: Sequence[str], batch_sizes: Sequence[int], settings: Settings
) -> dict[str, Any]:
    """Every set of weights in every engine at every batch size.

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
    for batch_size in batch_sizes:
        workers: dict[tuple[str, Subject], Worker] = {}
        try:
            for engine in engines:
                for subject in subjects:
                    _start(engine, subject, batch_size, settings, workers, missing, versions)
            times: dict[tuple[str, Subject], list[float]] = {key: [] for key in workers}
            keys = list(workers)
            for number in range(settings.rounds):
                first = number % max(len(keys), 1)  # nobody always follows the same neighbour
                for key in keys[first:] + keys[:first]:
                    times[key].append(workers[key].turn(settings.seconds))
        finally:
            for worker in workers.values():
                worker.close()
        rows += [_row(key, batch_size, times, subjects[0]) for key in times]
    return {"rows": rows, "not_measured": missing, "versions": versions}


def _start(
    engine: str,
    subject: Subject,
    batch_size: int,
    settings: Settings,
    workers: dict[tuple[str, Subject], Worker],
    missing: dict[str, str],
    versions: dict[str, str],
) -> None:
    """Add a worker, or say in ``missing`` why there is none."""
    file = subject.checkpoint if engine in TORCH_ENGINES else subject.onnx
    if engine in missing or (engine == "semi_structured" and subject.sparsity == 0):
        return
    if file is None:
        missing[engine] = "needs checkpoints and --model, not ONNX files"
        return
    worker = Worker(engine, subject, batch_size, settings)
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


def sparsity_of(path: Path) -> float:
    """Share of zeros in the matrices and kernels of an ONNX file."""
    weights = [zero for _, zero in _weights(_read(path))]
    return sum(int(zero.sum()) for zero in weights) / max(sum(zero.size for zero in weights), 1)


def fill_zeros(source: Path, target: Path) -> None:
    """A dense twin of an ONNX file: random values for zeros of matrices and kernels, as large as their other values. Speed asks for no more."""
    import onnx
    from onnx import numpy_helper

    graph = _read(source)
    generator = np.random.default_rng(0)
    for initializer, zero in _weights(graph):
        value = numpy_helper.to_array(initializer).copy()
        spread = float(np.sqrt(np.square(value[~zero]).mean())) if (~zero).any() else 0.02
        value[zero] = generator.normal(0, spread, int(zero.sum())).astype(value.dtype)
        initializer.CopyFrom(numpy_helper.from_array(value, initializer.name))
    onnx.save(graph, target)


def image_shape(path: Path) -> tuple[int, ...]:
    """Shape of one input of an ONNX file, without the batch.

    Raises:
        ValueError: more inputs than one, or sizes that are left open.
    """
    inputs = _read(path).graph.input
    sizes = [dimension.dim_value for dimension in inputs[0].type.tensor_type.shape.dim][1:]
    if len(inputs) != 1 or not sizes or not all(sizes):
        raise ValueError(
            f"{path}: one input of fixed size (but for the batch) is needed; it has {len(inputs)}, the first of {sizes}"
        )
    return tuple(sizes)


def _read(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        graph = onnx.load(path)
        onnx.checker.check_model(graph)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ValueError(f"{path} is no ONNX file, or damaged: {' '.join(str(error).split())[:160]}") from error
    return graph


def _weights(graph: Any) -> list[tuple[Any, np.ndarray]]:
    """Initializers that enter a product or convolution, with where they are zero."""
    from onnx import numpy_helper

    used = {name for node in graph.graph.node if node.op_type in ("MatMul", "Gemm", "Conv") for name in node.input}
    found = [item for item in graph.graph.initializer if item.name in used and len(item.dims) > 1]
    return [(item, numpy_helper.to_array(item) == 0) for item in found]
