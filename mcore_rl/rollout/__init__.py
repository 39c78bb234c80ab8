"""The servers that generate, as a replica's lead sees them.

sampler.py     prompts to groups of samples; dispatch.py: which server a request goes to
client.py      the HTTP API of one server; reply.py: what it answered, checked
inflight.py    groups that are generated beside training; saved.py: the same in a checkpoint
fleet.py, processes.py, child.py   servers that are lost and return; servers as child processes
columns.py     groups as arrays, for other ranks; experts.py: routing that is replayed
"""
