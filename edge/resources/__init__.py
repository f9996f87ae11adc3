"""What a device can afford: measured costs, a model of them, the planner, and the guard that watches while training."""
