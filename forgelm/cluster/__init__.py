"""Slurm: what it says of this job, runs sealed and submitted to it, jobs handed back to it."""
