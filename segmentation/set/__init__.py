"""The set that a job is laid out as: of which files it is made, and what is remembered of it."""
