"""Runs on clusters: `python -m megatron_prepo.launch RECIPE --executor slurm ...` (docs/launch.md).

| file | content | imports NeMo-Run |
|---|---|---|
| `__main__.py` | the command | |
| `recipes.py` | names of the configurations in `examples/` | |
| `job.py` | command lines of a job on its nodes | |
| `executors.py` | the job as a NeMo-Run experiment | yes |
| `rank.py` | inside a Slurm job: one training rank | |
| `servers.py` | inside a Slurm job: the SGLang servers of one node | |
| `process/slurm.py` | nodes and tasks of a job, from Slurm's environment | |

Modules that run inside a job do not import NeMo-Run, so containers need not have it.
"""
