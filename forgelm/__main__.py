"""`python -m forgelm` is the `forgelm` command."""

from forgelm.cli.main import entry

if __name__ == "__main__":
    entry()
