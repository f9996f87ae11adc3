"""What is published to a fleet: kits and packs, signed, and to whom they go when (The Update Framework)."""
