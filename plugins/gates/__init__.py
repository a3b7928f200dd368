"""What the compiled code costs, read from the code itself: rungs 5 and 6 of the ladder."""
