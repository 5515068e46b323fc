"""Hugging Face checkpoints to Megatron-Core and back; its mapping table also serves weight sync."""
