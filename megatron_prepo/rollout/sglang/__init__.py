"""Rollouts by SGLang servers over HTTP, which rank 0 alone talks to.

| file | what |
|---|---|
| `engine.py` | what the training loop sees: `generate`, `score_prompts`, `load_weights`, ... |
| `launch.py`, `guard.py` | servers of our own: started, watched, ended with us |
| `fleet.py` | the servers and the one way to call them, with a deadline |
| `generation.py` | many completions over several servers, each counted once |
| `completion.py` | what is asked for one completion, and what its answer must look like |
| `perplexity.py` | the same of one prompt's log-probabilities |
| `transport.py`, `ipc.py` | four ways for the weights |
| `on_cpu/` | what a server needs on a machine without CUDA; not for the trainer |
"""
