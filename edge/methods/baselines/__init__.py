"""What federation is compared with: a head on the frozen backbone, and adapters trained alone."""
