"""Tasks: where rows come from, how they are encoded, what is measured."""
