"""Online detectors: pure functions over small states of numbers, which are saved with the metrics."""
