"""The building blocks: each module is one noun and imports nothing from the top level."""
