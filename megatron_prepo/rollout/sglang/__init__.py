"""Rollouts by SGLang servers, which only rank 0 calls, over HTTP.

| file | what |
|---|---|
| `engine.py` | the engine: `generate`, `score_prompts`, `load_weights`, ... |
| `launch.py`, `guard.py` | servers that the run starts, monitors and stops |
| `fleet.py` | the servers, and all calls to them, with a deadline |
| `generation.py` | completions distributed over servers, each counted once |
| `completion.py` | request and response of one completion |
| `perplexity.py` | request and response of one prompt's log-probabilities |
| `transport.py`, `ipc.py` | four transports of weights |
| `on_cpu/` | what a server needs on a machine without CUDA; not for the trainer |
"""
