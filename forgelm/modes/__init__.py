"""Modes: each module builds the trainer of one. Imported when a run needs it: trainers are heavy."""
