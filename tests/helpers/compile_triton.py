"""Compile the Triton kernel ahead of time for GPUs, none of which is needed; print registers and spills as JSON. For ``tests/test_accelerator.py``."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from capruner.core.kernels.cuda import TILE_NUMBERS, _eliminate

TYPES = {
    **dict.fromkeys(("weight", "fisher_inv", "bias_", "rows", "losses"), "*fp32"),
    "order": "*i64",
    **dict.fromkeys(("B", "steps", "stay", "group"), "i32"),
    **dict.fromkeys(("eps", "never"), "fp32"),
    **dict.fromkeys(("WIDTH", "TILE"), "constexpr"),
}


def resources(capability: int, width: int) -> dict[str, int]:
    """Registers per thread and spilled bytes, by NVIDIA's assembler."""
    constants = {"WIDTH": width, "TILE": TILE_NUMBERS // width}
    source = ASTSource(
        fn=_eliminate, signature={name: TYPES[name] for name in _eliminate.arg_names}, constexprs=constants
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    nvidia = triton.knobs.nvidia
    assembler = (nvidia.ptxas_blackwell if capability >= 100 else nvidia.ptxas).path
    name = re.search(r"\.target\s+(sm_\w+)", compiled.asm["ptx"])
    assert name is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(compiled.asm["ptx"])
        done = subprocess.run(
            [assembler, "-v", f"--gpu-name={name[1]}", str(file), "-o", str(file.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=True,
        )
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    assert registers is not None, done.stderr
    assert spills, done.stderr
    return {"registers": int(registers[1]), "spills": sum(map(int, spills))}


if __name__ == "__main__":
    print(json.dumps({f"sm_{c} {width}": resources(c, width) for c in (80, 90, 100) for width in (64, 256)}))
