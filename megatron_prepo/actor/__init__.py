"""The model that learns, on Megatron-Core: the only package that reads `parallel_state`."""

import warnings

import torch

if not torch.cuda.is_available():
    # Megatron-Core's advice, at import, to install CUDA-only packages
    for advice in ("Apex is not installed", "Transformer Engine and Apex", "full scope is deprecated"):
        warnings.filterwarnings("ignore", message=advice)
