"""Faults in small fleets of real processes, and what is left on disk after them."""
