"""The model that learns, on Megatron-Core: the only package that reads `parallel_state`."""
