"""Hardware-in-the-loop tests, for labgrid: one suite for emulated boards and real ones."""
