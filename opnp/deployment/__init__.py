"""A detector as a folder: fitted, saved, applied to images, exported and served."""
