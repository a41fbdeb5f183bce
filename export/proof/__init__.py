"""Whether a file is what was simulated, and how it runs: parity, inspection, runtimes."""
