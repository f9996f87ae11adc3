"""The fleet's authority: it says who belongs, for how long, and who no longer does."""
