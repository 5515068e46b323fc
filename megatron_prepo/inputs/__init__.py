"""Inputs of a run, checked before it starts and compared when it resumes."""
