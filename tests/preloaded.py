"""What a process has imported from which ranks are forked: the library, its annotations checked.

Nearly all that a short test of several ranks costs is the imports of each rank.
"""

from __future__ import annotations

import gc
import os

from tests.annotations import check_annotations

check_annotations()

import torch._dynamo  # noqa: E402, F401  what torch's optimizers import when the first of them is made

import mcore_rl.launch.preflight  # noqa: E402
import mcore_rl.launch.start  # noqa: E402
import mcore_rl.training.loop  # noqa: E402
import mcore_rl.training.supervised  # noqa: E402
import mcore_rl.verify.layouts.measure  # noqa: E402, F401  what a rank imports

assert len(os.listdir("/proc/self/task")) == 1, "a thread would not be in what is forked"
gc.freeze()  # no collection of a rank walks, and so copies, what was imported here
