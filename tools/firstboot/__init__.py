"""What a board does when it starts for the first time."""
