"""What a device can say about itself: memory and its limits, pressure, heat, power, clock, disk, processor."""
