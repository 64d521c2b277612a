"""The demo: micrographs that are drawn, so that an answer can be judged by the truth."""
