"""What a metric is called, when it is wrong, and where it is kept."""
