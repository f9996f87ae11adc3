"""The aggregator: it collects the fleet's updates, averages them block by block and broadcasts the result."""
