"""GPUs with their memory and peak rates: published numbers, each with its source."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU; rates are the vendor's peaks."""

    memory: int
    """Bytes that the driver reports (`nvidia-smi`)."""
    flops: float
    """Dense bfloat16 operations per second."""
    bandwidth: float
    """Bytes per second to and from memory."""
    nvlink: float
    """Bytes per second to the GPUs of the same machine, in one direction."""
    source: str


GPUS = {
    "a100": Gpu(81920 * 2**20, 312e12, 2.039e12, 300e9, "NVIDIA A100 80GB SXM data sheet"),
    "h100": Gpu(81559 * 2**20, 989e12, 3.35e12, 450e9, "NVIDIA H100 SXM data sheet"),
    "h200": Gpu(143771 * 2**20, 989e12, 4.8e12, 450e9, "NVIDIA H200 SXM data sheet"),
    "b200": Gpu(183359 * 2**20, 2250e12, 8e12, 900e9, "NVIDIA DGX B200 data sheet, an eighth"),
}
DEVICE_NAMES = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""Their names as the driver reports them.  Slower cards of the same family (PCIe, NVL) have other
names and no peak here."""
GPUS_PER_MACHINE = 8
NETWORK = 50e9
"""Bytes per second and GPU between machines: a 400 Gb/s adapter per GPU (DGX H100, H200, B200)."""


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the published peak of a device for products of this type; None if unknown.

    >>> peak_flops("NVIDIA H200", "bfloat16"), peak_flops("NVIDIA H200", "float32")
    (989000000000000.0, None)
    """
    if dtype != "bfloat16" or device_name not in DEVICE_NAMES:
        return None
    return GPUS[DEVICE_NAMES[device_name]].flops
