"""FedMS: a global expert trained together, then a local expert and a gate on each device."""
