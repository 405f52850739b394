"""The calibration: Grams and sums of gradients."""
