"""Training of image classifiers: configuration, data, the loop, and what it leaves in a run's folder."""
