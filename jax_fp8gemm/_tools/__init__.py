"""What tests, benchmarks and the tuner share: shapes, operands, a device clock, the tuning loop."""
