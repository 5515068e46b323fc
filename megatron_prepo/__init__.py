"""megatron_prepo: PREPO (arXiv 2511.00794) on Megatron-Core.  Imports neither megatron nor sglang."""

__version__ = "0.1.0"
