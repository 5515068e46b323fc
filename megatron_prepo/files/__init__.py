"""Files that are complete or absent, whose they are, and who has them open."""
