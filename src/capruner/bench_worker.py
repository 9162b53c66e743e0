"""One engine, one ONNX model: ``python bench_worker.py ENGINE MODEL BATCH THREADS``. For each line of seconds on stdin a median latency on stdout.

Run as a file, with numpy and the engine and nothing else: the interpreter may be that of another environment.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def _onnxruntime(model: str, batch: int, threads: int) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    x = np.random.default_rng(0).standard_normal((batch, *entry.shape[1:]), dtype=np.float32)
    return lambda: session.run(None, {entry.name: x})


def _deepsparse(model: str, batch: int, threads: int) -> Callable[[], Any]:
    import deepsparse

    engine = deepsparse.Engine(model=model, batch_size=batch, num_cores=threads)
    shape = engine.input_shapes[0]
    x = np.random.default_rng(0).standard_normal(tuple(shape), dtype=np.float32)
    return lambda: engine.run([x])


def _openvino(model: str, batch: int, threads: int) -> Callable[[], Any]:
    import openvino

    core = openvino.Core()
    network = core.read_model(model)
    shape = [batch, *(d.get_length() for d in list(network.inputs[0].partial_shape)[1:])]
    network.reshape(shape)
    # Weights with at least half zeros are kept compressed where the CPU has the instructions for it.
    compiled = core.compile_model(
        network, "CPU", {"INFERENCE_NUM_THREADS": threads, "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": 0.5}
    )
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    request = compiled.create_infer_request()
    return lambda: request.infer([x])


def main() -> None:
    engine, model, batch, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    try:
        run = {"onnxruntime": _onnxruntime, "deepsparse": _deepsparse, "openvino": _openvino}[engine](
            model, batch, threads
        )
        for _ in range(3):
            run()
    except ModuleNotFoundError as error:
        _say({"error": f"{error.name} is not installed (pip install {engine}, or --python {engine}=PATH)"})
        return
    except Exception as error:  # whatever an engine raises is its reason for not taking the model
        _say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:180]}"})
        return
    _say({})
    for line in sys.stdin:
        times: list[float] = []
        seconds = float(line)
        warm = time.perf_counter() + seconds / 2  # after a pause threads and caches take a while to come back
        while time.perf_counter() < warm:
            run()
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        _say({"latency": statistics.median(times)})


def _say(answer: dict[str, Any]) -> None:
    print("@" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
