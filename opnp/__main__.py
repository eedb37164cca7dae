"""`python -m opnp` is the program `opnp`."""

from opnp.cli.app import main

if __name__ == "__main__":
    main()
