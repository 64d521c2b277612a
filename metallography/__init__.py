"""From masks to numbers: prediction, measurement, ranking, export. Knows no training."""
