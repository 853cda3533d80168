"""What tests and benchmarks share: programs, swarms, clients, tiny models."""
