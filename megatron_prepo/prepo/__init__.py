"""Mathematics of PREPO on tensors and numbers, without configuration or collectives."""
