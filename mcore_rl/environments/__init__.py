"""Rollouts of several turns: a user's function plays them with the model, and every sampled id is kept.

policy.py      what it plays with: `generate`, within limits; dialogue.py: messages that keep their ids
recorder.py    the ids of a rollout, as the segments of one sample
run.py         rollouts as tasks of one event loop; deadlines.py: what each may take; load.py: the function
tools.py       calls of Python functions
gateway/       the model behind the APIs of OpenAI and Anthropic, for agents that know nothing of this library
"""
