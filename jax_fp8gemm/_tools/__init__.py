"""What benchmarks, tests and tuning share."""
