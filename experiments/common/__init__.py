"""What every command shares: the command line, progress bars, records."""
