"""What a run needs before it starts: parameters, memory and time of every parallel layout.

count.py    parameters on every rank, exactly, from the table that the real build loads by
work.py     what one step of a config asks for: samples, tokens, passes of which model
memory.py   bytes per rank and component, per pipeline stage
clock.py    seconds per phase, with one fitted efficiency each
search.py   every layout of so many GPUs: legal or why not, best first
show.py     the table for people, and the JSON object
"""
