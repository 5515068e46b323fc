"""Hugging Face checkpoints to Megatron-Core and back; its mapping table also serves weight sync.

python -m checkpoints_convert import --hf DIR --out DIR
python -m checkpoints_convert export --megatron DIR --hf DIR --out DIR
"""

import megatron_prepo  # noqa: F401 - its warning filters come before megatron is imported
