"""Where a federation runs: `inline` in this process, `ray` in Flower's simulation."""
