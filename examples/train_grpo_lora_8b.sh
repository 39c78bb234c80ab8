#!/usr/bin/env bash
''':'
# A shell script and a Python program in one file: `bash train_grpo_lora_8b.sh` starts every rank of this node, and
# `torchrun ... examples/train_grpo_lora_8b.sh` on each node runs the Python below as one rank. Options are passed on.
root="$(cd "$(dirname "$0")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
exec "$python" "$0" "$@"
: <<'# end of the Python part'
'''
import os
import sys

from mcore_rl.__main__ import main

if __name__ == "__main__":
    os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.exit(main(["train", "examples/grpo_lora_8b.toml", *sys.argv[1:]]))
# end of the Python part
