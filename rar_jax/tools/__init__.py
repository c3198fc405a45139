"""The tools bench, plan, inspect, report and doctor.

They may import everything; only the command line imports them.
"""
