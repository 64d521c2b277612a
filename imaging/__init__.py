"""Between files and pixels: reading, keeping and drawing images and masks."""
