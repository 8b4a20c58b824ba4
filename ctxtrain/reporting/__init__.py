"""What a run came to: summary, verdict, report."""
