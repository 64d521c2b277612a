"""What holds for every test: one thread, and no deadline per example on a busy machine."""

from __future__ import annotations

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")
