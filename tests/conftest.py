"""What holds for every test: one thread, and no deadline per example on a busy machine."""

from __future__ import annotations

import os

import hypothesis
import torch

# glibc's own default, said aloud: `keep_freed_memory` then leaves the process of the tests alone,
# some of which measure its memory.
os.environ["MALLOC_TRIM_THRESHOLD_"] = "131072"

torch.set_num_threads(1)
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")
