"""What the ranks of `ranks.py` are forked with: imported once, and left alone by their garbage
collectors, which would otherwise copy all of it.
"""

import gc

import tiny_models  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401

gc.collect()
gc.freeze()
