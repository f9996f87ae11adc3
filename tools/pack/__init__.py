"""``fleetune pack``: compiles a backbone in Hugging Face format into a pack that devices train without torch."""
