"""Compile the head's kernels for GPUs that this machine need not have; print what ptxas reports.

    python -m tests.unit.actor.compiled_kernels rows|epilogue CAPABILITY ...

One JSON line: [{kernel, target, ptx, shared, registers, spilled}].  Tests start it (`reported`),
since a process that interprets kernels (`conftest`) cannot compile them.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

HOPPER, BLACKWELL = 90, 100


class Kernel(NamedTuple):
    """A kernel with its constants, as it is launched for bfloat16 weights."""

    function: Any
    constants: dict[str, Any]
    types: dict[str, str]
    """Types of arguments that are no pointers to float32."""
    options: dict[str, int]
    odd: tuple[str, ...] = ()
    """Arguments that 16 need not divide; all others are addresses or sizes of full cache lines."""


def reported(kernels: str, folder: Path, *capabilities: int) -> list[dict]:
    """Compile in another process, with Triton's cache in a folder; return its report."""
    root = Path(__file__).parents[3]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    words = ["-m", "tests.unit.actor.compiled_kernels", kernels, *map(str, capabilities)]
    made = subprocess.run(
        [sys.executable, *words],
        env=environment | {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)


def rows(capability: int) -> dict[str, Kernel]:
    """Return the operations on rows."""
    from megatron_prepo.actor import lm_head_triton as kernels

    strides = ("z_stride", "out_stride", "scale_stride")
    types = dict.fromkeys(("num_rows", "num_columns", *strides), "i32")
    types |= {"target": "*i64", "out": "*bf16"}
    common = types, {"num_warps": kernels.WARPS}
    block = {"BLOCK": kernels.BLOCK}
    return {
        "_statistics": Kernel(kernels._statistics, block, *common),
        "_gradient": Kernel(kernels._gradient, block | {"WITH_ENTROPY": False}, *common),
        "_gradient, entropy": Kernel(kernels._gradient, block | {"WITH_ENTROPY": True}, *common),
    }


def epilogue(capability: int) -> dict[str, Kernel]:
    """Return the product with statistics of each tile."""
    from tools.bench import head_epilogue

    kernels = {}
    for tile in head_epilogue.TILES[capability // 10]:
        types = dict.fromkeys(("num_rows", "num_columns", "width", "tiles"), "i32")
        types |= {"target": "*i64", "hidden": f"tensordesc<bf16[{tile.tokens}, {tile.width}]>"}
        types |= {"weight": f"tensordesc<bf16[{tile.words}, {tile.width}]>"}
        kernels[str(tile)] = Kernel(
            head_epilogue._product_statistics,
            {
                "TOKENS": tile.tokens,
                "WORDS": tile.words,
                "WIDTH": tile.width,
                "ONE_LOOP": tile.one_loop,
            },
            types,
            {"num_warps": tile.warps, "num_stages": tile.stages},
            odd=("hidden", "weight", "tiles"),
        )
    return kernels


def compiled(name: str, kernel: Kernel, capability: int) -> dict:
    """Compile one kernel as it is launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants, arguments = kernel.constants, list(enumerate(kernel.function.arg_names))
    signature = {
        a: "constexpr" if a in constants else kernel.types.get(a, "*fp32") for _, a in arguments
    }
    aligned = [(i,) for i, a in arguments if a not in constants and a not in kernel.odd]
    source = ASTSource(
        kernel.function,
        signature,
        constexprs=constants,
        attrs={index: [["tt.divisibility", 16]] for index in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options=kernel.options)
    made_of = {"ptx": made.asm["ptx"], "shared": made.metadata.shared}
    return {"kernel": name, "target": capability, **made_of, **report(made.asm["ptx"], capability)}


def report(ptx: str, capability: int) -> dict:
    """Return the registers per thread and the bytes that did not fit them."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

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
    kernels_for = {"rows": rows, "epilogue": epilogue}[sys.argv[1]]
    print(
        json.dumps(
            [
                compiled(name, kernel, capability)
                for capability in map(int, sys.argv[2:])
                for name, kernel in kernels_for(capability).items()
            ]
        )
    )
