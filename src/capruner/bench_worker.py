"""One engine and one set of weights: ``python bench_worker.py JOB``. For each line of seconds on stdin a median latency on stdout.

Run as a file, with the engine and numpy and for torch this package: the interpreter may be that of another environment.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Run = Callable[[], Any]


def _images(job: dict[str, Any]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((job["batch"], *job["shape"]), dtype=np.float32)


def _onnxruntime(job: dict[str, Any]) -> tuple[Run, str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    session = onnxruntime.InferenceSession(job["file"], options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: _images(job)}
    return lambda: session.run(None, feed), f"onnxruntime {onnxruntime.__version__}, float32"


def _deepsparse(job: dict[str, Any]) -> tuple[Run, str]:
    import deepsparse

    engine = deepsparse.Engine(model=job["file"], batch_size=job["batch"], num_cores=job["threads"])
    images = [_images(job)]
    return lambda: engine.run(images), f"deepsparse {deepsparse.__version__}, float32"


def _openvino(job: dict[str, Any]) -> tuple[Run, str]:
    import openvino

    core = openvino.Core()
    network = core.read_model(job["file"])
    network.reshape([job["batch"], *job["shape"]])
    # Left to itself OpenVINO takes bfloat16 where the CPU has it; it does when asked, so that engines are compared on equal terms.
    dtype = job["options"].get("dtype", "float32")
    settings = {
        "INFERENCE_NUM_THREADS": job["threads"],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype],
    }
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    images = [_images(job)]
    return lambda: request.infer(images), f"openvino {openvino.__version__.partition('-')[0]}, {dtype}"


def _torch(job: dict[str, Any]) -> tuple[Run, str]:
    import torch

    from capruner.export import load_pruned, to_semi_structured

    asked = job["options"]
    if job["engine"] == "semi_structured" and asked["device"] != "cuda":
        raise ValueError("2:4 kernels are for GPUs: --device cuda --dtype bfloat16")
    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, asked["dtype"])
    model, _ = load_pruned(asked["model"], asked["kwargs"], job["file"])
    model = model.to(asked["device"], dtype)
    if job["engine"] == "semi_structured":
        to_semi_structured(model)
    images = torch.from_numpy(_images(job)).to(asked["device"], dtype)
    call = torch.compile(model) if asked["compile"] else model

    def run() -> None:
        with torch.inference_mode():
            call(images)
        if asked["device"] == "cuda":
            torch.cuda.synchronize()

    where = torch.cuda.get_device_name() if asked["device"] == "cuda" else "CPU"
    return run, f"torch {torch.__version__}, {asked['dtype']}, {where}{', compiled' if asked['compile'] else ''}"


ENGINES = {
    "onnxruntime": _onnxruntime,
    "deepsparse": _deepsparse,
    "openvino": _openvino,
    "torch": _torch,
    "semi_structured": _torch,
}


def main() -> None:
    """Say that it is ready, or why not; then answer."""
    job = json.loads(sys.argv[1])
    try:
        run, note = ENGINES[job["engine"]](job)
        for _ in range(3):
            run()
    except ModuleNotFoundError as error:
        _say({"error": f"{error.name} is not installed (pip install {error.name}, or --python {job['engine']}=PATH)"})
        return
    except Exception as error:  # whatever an engine raises is its reason for not taking the model
        _say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"})
        return
    _say({"note": note})
    for line in sys.stdin:
        seconds, times = float(line), list[float]()
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
