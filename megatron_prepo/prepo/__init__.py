"""The mathematics of PREPO: tensors and numbers in, no configuration, no collectives."""
