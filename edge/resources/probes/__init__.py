"""What a device can say about itself: memory, limits, pressure, heat, power, clock, disk, processor. Reads, never writes."""
