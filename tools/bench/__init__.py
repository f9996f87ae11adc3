"""Benchmarks: Fleetune beside its peers, in turns, in one run; each prints a table and writes one kind of JSON."""
