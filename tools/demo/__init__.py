"""``fleetune demo``: a whole fleet on one machine, arranged from the commands that a real fleet uses."""
