"""Every layout against one rank: the proof behind `mcore-rl verify layouts`."""
