"""The table of methods: repeats, resampling, the pixel classifier."""
