"""Caching on a connected machine, proving what is there, carrying it over. Prints nothing."""
