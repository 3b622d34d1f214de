"""What a run tells about itself: metric names, loggers, goodput and the report."""
