"""What a run reads, checked before it starts and compared when it resumes."""
