"""Ranks: the processes that ``torchrun`` starts to compute together. Alone, a process is rank 0."""
