"""For people: curves, pictures, the page on an experiment, the look at frozen features."""
