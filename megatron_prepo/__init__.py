"""PREPO (arXiv 2511.00794) on Megatron-Core.  Imports neither megatron nor sglang."""

import warnings

__version__ = "0.1.0"

# Megatron-Core's advice at import, repeated by each of its files; `actor.model.describe` logs once
# what is used in place of the missing packages.
for _advice in (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    "full scope is deprecated",
    r"`torch\.distributed\.\w+` is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
):
    warnings.filterwarnings("ignore", message=_advice)
