"""What devices and the aggregator say to each other: topics, manifests, tensors, chunks, and the MQTT 5 link.

This is the only part of ``fleetune.edge`` that ``fleetune.server`` imports.
"""
