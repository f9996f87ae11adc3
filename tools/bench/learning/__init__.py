"""What a fleet learns, under codecs, attacks and noise, in one process."""
