"""Experiments that hold a method against others on the same data: many clients, one after the other, in one process."""
