"""What a run does: pretraining, and training with labels, as small differences from one loop."""
