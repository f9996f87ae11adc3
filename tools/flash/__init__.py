"""What boards are flashed with."""
