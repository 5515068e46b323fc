"""The trained model, on Megatron-Core: the only package that reads `parallel_state`."""
