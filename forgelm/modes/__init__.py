"""Modes: each module builds the trainer of one. Heavy: imported when needed."""
