"""From a folder of images and one mask to a report: the work of ``segment.py``, step by step."""
