"""Modules that the ranks of `ranks.py` are forked with: imported once, and excluded from garbage
collection, which would otherwise copy all of them."""

import gc

import tiny_models  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401

import megatron_prepo.actor.actor
import megatron_prepo.train  # noqa: F401

gc.collect()
gc.freeze()
