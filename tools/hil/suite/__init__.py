"""The suite: what a board of a fleet has to do, and to withstand."""
