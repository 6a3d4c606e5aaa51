"""`python -m optimus` is the `optimus` command."""

from .cli import main

if __name__ == "__main__":
    main()
