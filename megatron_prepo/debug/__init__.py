"""Dumped steps, their replay, and the check of resume."""
