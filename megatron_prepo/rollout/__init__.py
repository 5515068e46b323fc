"""What generates completions: `engine.py` has the interface, `build.py` the choice."""
