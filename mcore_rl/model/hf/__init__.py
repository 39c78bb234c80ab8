"""Models as Hugging Face writes them: configs, names, files and their torch_dist form."""
