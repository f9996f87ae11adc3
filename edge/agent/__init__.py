"""The resident agent of a device: it answers rounds, and keeps what must survive a restart on disk."""
