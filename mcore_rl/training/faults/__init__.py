"""What a run does when a rank fails, hangs or computes a number that is not finite."""
