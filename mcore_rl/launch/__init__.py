"""How a run starts: checks of the machine, ranks, rehearsals and replays."""
