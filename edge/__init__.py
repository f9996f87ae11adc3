"""What is flashed to a device: it trains adapters on a packed backbone and sends them to the aggregator.

Nothing below this package imports torch, transformers or optimum.
"""
