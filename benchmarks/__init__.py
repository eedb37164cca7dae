"""What is measured by hand, one module each; see README.md here for the figures."""
