"""From files to packed batches.

locate.py, opening.py, tables.py, arrow.py   which files, and their rows by number
reader.py      a row to a prompt; messages.py, chat.py: conversations and their templates
examples.py    a row to what is trained without rollouts; turns.py: what of it the assistant said
prompts.py     all prompts of a run; cursor.py, quota.py, curriculum.py: which of them come next
packing.py, balance.py   sequences to micro-batches, the same number on every rank
fingerprint.py how a resume knows the data
"""
