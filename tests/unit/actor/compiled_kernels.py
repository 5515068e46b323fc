"""Compile the head's kernels for GPUs that this machine need not have; print what ptxas reports.

One JSON line: [{kernel, target, registers, spilled, ptx}].  `test_lm_head_kernels` starts it, since
a process that interprets kernels (`conftest`) cannot compile them.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from megatron_prepo.actor import lm_head_triton

TARGETS = (90, 100)
TYPES = {"target": "*i64", "out": "*bf16", "num_rows": "i32", "num_columns": "i32"}
CONSTANTS = {
    "_statistics": {"BLOCK": lm_head_triton.BLOCK},
    "_gradient": {"BLOCK": lm_head_triton.BLOCK, "WITH_ENTROPY": False},
    "_gradient, entropy": {"BLOCK": lm_head_triton.BLOCK, "WITH_ENTROPY": True},
}


def compiled(name: str, capability: int) -> dict:
    """Compile one kernel as it is launched for bfloat16 weights and rows of full cache lines."""
    kernel = lm_head_triton.__dict__[name.split(",")[0]]
    signature = {a: "constexpr" if a in CONSTANTS[name] else of(a) for a in kernel.arg_names}
    aligned = [(i,) for i, a in enumerate(kernel.arg_names) if a not in CONSTANTS[name]]
    source = ASTSource(
        kernel,
        signature,
        constexprs=CONSTANTS[name],
        attrs={index: [["tt.divisibility", 16]] for index in aligned},
    )
    options = {"num_warps": lm_head_triton.WARPS}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = kernel.asm["ptx"]
    return {"kernel": name, "target": capability, "ptx": ptx, **report(ptx, capability)}


def of(argument: str) -> str:
    """Return the type of an argument: strides are numbers, and other pointers are to float32."""
    return "i32" if argument.endswith("_stride") else TYPES.get(argument, "*fp32")


def report(ptx: str, capability: int) -> dict:
    """Return the registers per thread and the bytes that did not fit them."""
    arch = sm_arch_from_capability(capability)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        words = ["-v", f"--gpu-name={arch}", path, "-o", Path(folder, "kernel.cubin")]
        command = [get_ptxas(capability).path, *words]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spilled = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", text)
    (registers,) = re.findall(r"Used (\d+) registers", text)
    assert len(spilled) == 3, text
    return {"registers": int(registers), "spilled": sum(map(int, spilled))}


if __name__ == "__main__":
    print(json.dumps([compiled(name, target) for name in CONSTANTS for target in TARGETS]))
