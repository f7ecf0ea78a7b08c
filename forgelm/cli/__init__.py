"""The commands: reading arguments and printing, no more. One module each, imported when called."""
