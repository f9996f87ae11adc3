"""``fleetune plan``: what a device would train, from its profile, without the device."""
