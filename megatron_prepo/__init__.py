"""PREPO (arXiv 2511.00794) on Megatron-Core.  Imports neither megatron nor sglang."""

from megatron_prepo.process import library_messages

__version__ = "0.1.0"

library_messages.install()
