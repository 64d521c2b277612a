"""The table of methods: its plan, its runs and their resampling, the pixel classifier."""
