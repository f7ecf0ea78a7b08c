"""The stages of a run, in the order in which the pipeline goes through them."""
