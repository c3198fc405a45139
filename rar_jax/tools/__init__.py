"""Tools around the work: bench, plan, inspect, report, doctor. They may import everything; only the command line imports them."""
