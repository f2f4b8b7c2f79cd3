"""Training of image classifiers: configuration, data, the loop, and the files in a run's folder."""
