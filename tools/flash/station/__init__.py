"""The machine at which boards are flashed: which are connected, what would go wrong, and what was done to each."""
