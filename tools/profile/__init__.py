"""``fleetune profile``: measures what training costs on this device."""
