"""Talking to what was trained: `mcore-rl serve` with OpenAI's API beside SGLang's, and `mcore-rl chat`."""
