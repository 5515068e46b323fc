"""Conversion of checkpoints between Hugging Face and Megatron-Core; weight sync uses its mapping.

python -m checkpoints_convert import --hf DIR --out DIR
python -m checkpoints_convert export --megatron DIR --hf DIR --out DIR
"""

import megatron_prepo  # noqa: F401 - sets warning filters before megatron is imported
