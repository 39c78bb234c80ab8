"""Models between Hugging Face safetensors and torch_dist, one tensor at a time."""
