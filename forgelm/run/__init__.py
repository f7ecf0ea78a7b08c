"""The run directory: its paths, its state, who is in it, and what is known about the run."""
