"""`python -m switchrun` is the same as `switchrun`."""

from switchrun.cli.app import main

if __name__ == "__main__":
    main()
