"""Images: where they come from, how they are decoded and prepared, and outliers made of them."""
