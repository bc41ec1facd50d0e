"""One file per question: configs, benchmarks and reports. Nothing imports this package."""
