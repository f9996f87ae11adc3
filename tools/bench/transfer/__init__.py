"""What travels, and how fast: rounds in which nobody trains."""
