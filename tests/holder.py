"""A process that holds a folder's lock: ``python -c HOLD folder root``; it says "held"."""

HOLD = """
import sys, time
from unittest.mock import MagicMock
sys.modules["torch"] = MagicMock()  # importing it takes seconds, and a lock needs nothing of it
sys.path.insert(0, sys.argv[2])
from utils.run_folder import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
