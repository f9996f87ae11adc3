"""A board that QEMU emulates."""
