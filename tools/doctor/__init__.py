"""What may be wrong with a device, found before a fleet finds out: one module for each thing that is looked at."""
