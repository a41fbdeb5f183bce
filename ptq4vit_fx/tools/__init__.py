"""What is built on the library, and what the library never imports: command line, demo, coverage, models, data."""
