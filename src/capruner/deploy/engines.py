"""Inference engines behind one interface; run as a file, a worker process that times one engine.

Apart from torch's, the engines need numpy and their own package only, so that the worker can run in an interpreter without capruner.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Engine:
    """A loaded model.

    Attributes:
        note: the engine's version and precision.
        place: converts a batch of images ``(batch, *shape)`` to the engine's input.
        run: computes the outputs ``(batch, classes)`` of a placed input.
    """

    note: str
    place: Callable[[np.ndarray], Any]
    run: Callable[[Any], np.ndarray]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.run(self.place(images))


def load_onnxruntime(job: dict[str, Any]) -> Engine:
    """``job["file"]`` is ONNX."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    session = onnxruntime.InferenceSession(job["file"], options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Engine(
        f"onnxruntime {onnxruntime.__version__}", lambda images: {name: images}, lambda feed: session.run(None, feed)[0]
    )


def load_mnn(job: dict[str, Any]) -> Engine:
    """``job["file"]`` is what :func:`capruner.deploy.mnn.convert` wrote."""
    import MNN
    from MNN import expr, nn

    # "normal" precision computes in half precision where the CPU can; the engines are compared in the same one.
    runtime = nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": job["threads"]},))
    module = nn.load_module_from_file(job["file"], ["input"], ["output"], runtime_manager=runtime)
    return Engine(
        f"MNN {MNN.version()}",
        lambda images: expr.const(images, list(images.shape), expr.NCHW),
        lambda images: np.array(module.forward([images])[0].read()),
    )


def load_deepsparse(job: dict[str, Any]) -> Engine:
    """``job["file"]`` is ONNX; the batch size is fixed."""
    import deepsparse

    engine = deepsparse.Engine(model=job["file"], batch_size=job["batch"], num_cores=job["threads"])
    return Engine(f"deepsparse {deepsparse.__version__}", lambda images: [images], lambda feed: engine.run(feed)[0])


def load_openvino(job: dict[str, Any]) -> Engine:
    """``job["file"]`` is ONNX; the batch size is fixed."""
    import openvino

    core = openvino.Core()
    network = core.read_model(job["file"])
    network.reshape([job["batch"], *job["shape"]])
    # By default OpenVINO computes in bfloat16 where the CPU can; the engines are compared in the same precision.
    dtype = job["options"].get("dtype", "float32")
    settings = {
        "INFERENCE_NUM_THREADS": job["threads"],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype],
    }
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    return Engine(
        f"openvino {openvino.__version__.partition('-')[0]}, {dtype}",
        lambda images: [images],
        lambda feed: request.infer(feed)[0],
    )


def load_torch(job: dict[str, Any]) -> Engine:
    """``job["file"]`` is a checkpoint of the timm model in ``job["options"]``."""
    import torch

    from capruner.deploy.export import load_pruned
    from capruner.deploy.semi_structured import to_semi_structured

    options = job["options"]
    device, dtype = options["device"], getattr(torch, options["dtype"])
    if job["engine"] == "semi_structured" and device != "cuda":
        raise ValueError("2:4 kernels are for GPUs: --device cuda --dtype bfloat16")
    torch.set_num_threads(job["threads"])
    model, _ = load_pruned(options["model"], options["kwargs"], job["file"])
    model = model.to(device, dtype)
    if job["engine"] == "semi_structured":
        to_semi_structured(model)
    call = torch.compile(model) if options["compile"] else model

    def run(images: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(call(images).float().cpu())

    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    compiled = ", compiled" if options["compile"] else ""
    return Engine(
        f"torch {torch.__version__}, {options['dtype']}, {where}{compiled}",
        lambda images: torch.from_numpy(images).to(device, dtype),
        run,
    )


ENGINES = {
    "torch": load_torch,
    "semi_structured": load_torch,
    "onnxruntime": load_onnxruntime,
    "mnn": load_mnn,
    "openvino": load_openvino,
    "deepsparse": load_deepsparse,
}


def main() -> None:
    """Load the engine of the job in ``argv[1]``; then answer each line of seconds on stdin with the median latency over that time."""
    job = json.loads(sys.argv[1])
    images = np.random.default_rng(0).standard_normal((job["batch"], *job["shape"]), dtype=np.float32)
    try:
        engine = ENGINES[job["engine"]](job)
        placed = engine.place(images)
        for _ in range(3):
            engine.run(placed)
    except ModuleNotFoundError as error:
        _say({"error": f"{error.name} is not installed (pip install {error.name}, or --python {job['engine']}=PATH)"})
        return
    except Exception as error:  # engines raise anything for models that they do not support
        _say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"})
        return
    _say({"note": engine.note})
    for line in sys.stdin:
        seconds, times = float(line), list[float]()
        warm = time.perf_counter() + seconds / 2  # threads and caches recover from the pause
        while time.perf_counter() < warm:
            engine.run(placed)
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            engine.run(placed)
            times.append(time.perf_counter() - start)
        _say({"latency": statistics.median(times)})


def _say(answer: dict[str, Any]) -> None:
    print("@" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
