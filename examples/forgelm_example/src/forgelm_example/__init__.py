"""What forgelm lets other packages add, one of each kind.

Nothing is imported here: forgelm loads this package to find its configs, before each command.
"""
