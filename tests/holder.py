"""A process that holds a folder's lock: ``python -c HOLD folder root``; it says "held"."""

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from utils.run_folder import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
