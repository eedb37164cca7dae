"""The program `opnp`."""
